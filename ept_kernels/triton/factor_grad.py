"""Gradients of the seed's factors, dA from (dU, x) and dB from (V, dy), in two deterministic stages.

Beside them, in the same launch, the first of two stages for the folded kernels where every row is a unit.

D_k[p, c] = sum_t W_k[t, p, c % k] rows[t, c]        first stage: partial sums over spans of rows
dF[p, j]  = sum_k sum_{q < k} D_k[p, j k + q]        second stage (``reduce.py``): spans, scales and slots
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import factor_grad_candidates, reduce_config, row_spans
from .launch import FROM_BATCH, Config, launch
from .plan import Plan
from .precision import dot_precision
from .reduce import sum_units
from .tiles import block_columns, keep_mask
from .tune import choose, layout, row_bucket

#: Rows whose bits of activity are read at once.
BITS = tl.constexpr(1024)


@triton.jit
def span_sums(
    rows_ptr,
    core_ptr,
    active_ptr,  # [rank blocks, T]: in which scales a row of the core is not zero
    partial_ptr,
    seed_ptr,
    p_drop,
    rows_total,
    span,
    features,
    rank,
    stride_row,
    stride_feature,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program's D_k: a block of channels, a span of rows, a block of ranks.

    ``AT_ONCE`` scales share a pass over the rows: as many as have room in the registers.
    """
    c0 = tl.program_id(0) * BLOCK_C
    if c0 < features:
        rank_blocks = tl.cdiv(rank, RANK_BLOCK)
        index = tl.program_id(1)
        rank_block, part = index % rank_blocks, index // rank_blocks
        p0 = rank_block * RANK_BLOCK
        start = part.to(tl.int64) * span
        end = tl.minimum(start + span, rows_total)
        channels = c0 + tl.arange(0, BLOCK_C)
        channel_exists = channels < features
        # Scales that no row of the span uses are not read. They are multiplied, though: a branch would keep the
        # compiler from loading ahead.
        seen = tl.zeros((BITS,), tl.int32)
        for t0 in range(start, end, BITS):
            t = t0 + tl.arange(0, BITS)
            seen |= tl.load(active_ptr + rank_block.to(tl.int64) * rows_total + t, mask=t < end, other=0)
        used = 0
        for s in tl.static_range(len(SCALES)):
            used += tl.max((seen >> s) & 1, 0) << s
        for first in tl.static_range(0, len(SCALES), AT_ONCE):
            accumulators = ()
            for s in tl.static_range(first, len(SCALES)):
                if s < first + AT_ONCE:
                    accumulators = accumulators + (tl.zeros((RANKS[s] * SLOTS[s], BLOCK_C), tl.float32),)
            for t0 in range(start, end, BLOCK_T):
                lines = t0 + tl.arange(0, BLOCK_T)
                line_exists = lines < end
                x = tl.load(
                    rows_ptr + lines[:, None] * stride_row + channels[None, :].to(tl.int64) * stride_feature,
                    mask=line_exists[:, None] & channel_exists[None, :],
                    other=0.0,
                )
                if DROPOUT:
                    kept = keep_mask(tl.load(seed_ptr), lines, channels, p_drop)
                    x = tl.where(kept, x.to(tl.float32) / (1.0 - p_drop), 0.0).to(x.dtype)
                updated = ()
                for s in tl.static_range(first, len(SCALES)):
                    if s < first + AT_ONCE:
                        columns, exists = block_columns(p0, rank, SCALES[s], SLOTS[s], RANKS[s], RANK_BLOCK)
                        core = tl.load(
                            core_ptr + lines[None, :] * WIDTH + COLUMNS[s] + columns[:, None],
                            mask=line_exists[None, :] & exists[:, None] & ((used >> s) & 1 > 0),
                            other=0.0,
                        )
                        total = accumulators[s - first]
                        updated = updated + (tl.dot(core, x, total, input_precision=PRECISION),)
                accumulators = updated
            for s in tl.static_range(first, len(SCALES)):
                if s < first + AT_ONCE:
                    slot = tl.arange(0, SLOTS[s])
                    own = slot[None, :, None] == (channels % SCALES[s])[None, None, :]
                    blocks = tl.reshape(accumulators[s - first], (RANKS[s], SLOTS[s], BLOCK_C))
                    sums = tl.sum(tl.where(own, blocks, 0.0), 1)  # [RANKS[s], BLOCK_C]
                    p = tl.arange(0, RANKS[s])
                    exists_p = (p < RANK_BLOCK) & (p0 + p < rank)
                    line = (part * len(SCALES) + s).to(tl.int64) * rank + (p0 + p)
                    tl.store(
                        partial_ptr + line[:, None] * features + channels[None, :],
                        sums,
                        mask=exists_p[:, None] & channel_exists[None, :],
                    )


@triton.jit
def folded_span_sums(
    units_ptr,  # [rank blocks, T, FOLDED]
    groups_ptr,  # [segments]
    uses_ptr,  # [G, S] bool or None
    partial_ptr,  # [spans, G, FOLDED] out
    rows_total,
    segment,
    span,
    spans,
    num_groups,
    rank,
    SCALES: tl.constexpr,
    OFFSETS: tl.constexpr,
    FOLDED: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Sums over a span of rows, by group; programs take (span, group, block of entries) by turns."""
    blocks = tl.cdiv(FOLDED, BLOCK_F)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for index in range(tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), spans * num_groups * blocks, programs):
        entry = (index % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
        line = index // blocks
        part, group = line // num_groups, line % num_groups
        total = sum_units(
            units_ptr,
            groups_ptr,
            uses_ptr,
            group,
            entry,
            part * span,
            tl.minimum(part * span + span, rows_total),
            rows_total,
            segment,
            tl.cdiv(rank, RANK_BLOCK),
            SCALES,
            OFFSETS,
            FOLDED,
            BLOCK_U,
            BLOCK_F,
        )
        tl.store(partial_ptr + line.to(tl.int64) * FOLDED + entry, total, mask=entry < FOLDED)


@triton.jit(do_not_specialize=FROM_BATCH)
def factor_grad_kernel(
    x_ptr,  # [T, in] or None
    du_ptr,  # [T, WIDTH]
    du_active_ptr,  # [rank blocks, T] bits
    partial_a_ptr,  # [spans, S, rank, in] out
    dy_ptr,  # [T, out] or None
    v_ptr,  # [T, WIDTH]
    v_active_ptr,  # [rank blocks, T] bits
    partial_b_ptr,  # [spans, S, rank, out] out
    units_ptr,  # [rank blocks, T, FOLDED]: dKbar of every row, or None
    groups_ptr,  # [segments]
    uses_ptr,  # [G, S] bool or None
    partial_folded_ptr,  # [spans, G, FOLDED] out
    seed_ptr,
    p_drop,
    rows_total,
    segment,
    span,
    spans,
    num_groups,
    in_features,
    out_features,
    rank,
    x_stride_row,
    x_stride_feature,
    dy_stride_row,
    dy_stride_feature,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDED: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    side = tl.program_id(2)
    if units_ptr is not None:
        if side == tl.num_programs(2) - 1:
            folded_span_sums(
                units_ptr,
                groups_ptr,
                uses_ptr,
                partial_folded_ptr,
                rows_total,
                segment,
                span,
                spans,
                num_groups,
                rank,
                SCALES,
                OFFSETS,
                FOLDED,
                RANK_BLOCK,
                BLOCK_U,
                BLOCK_F,
            )
    if x_ptr is not None:
        if side == 0:
            span_sums(
                x_ptr,
                du_ptr,
                du_active_ptr,
                partial_a_ptr,
                seed_ptr,
                p_drop,
                rows_total,
                span,
                in_features,
                rank,
                x_stride_row,
                x_stride_feature,
                SCALES,
                SLOTS,
                RANKS,
                COLUMNS,
                WIDTH,
                RANK_BLOCK,
                DROPOUT,
                PRECISION,
                BLOCK_T,
                BLOCK_C,
                AT_ONCE,
            )
    if dy_ptr is not None:
        if side == (1 if x_ptr is not None else 0):
            span_sums(
                dy_ptr,
                v_ptr,
                v_active_ptr,
                partial_b_ptr,
                seed_ptr,
                p_drop,
                rows_total,
                span,
                out_features,
                rank,
                dy_stride_row,
                dy_stride_feature,
                SCALES,
                SLOTS,
                RANKS,
                COLUMNS,
                WIDTH,
                RANK_BLOCK,
                False,
                PRECISION,
                BLOCK_T,
                BLOCK_C,
                AT_ONCE,
            )


@dataclass(frozen=True)
class Side:
    """What one factor's gradient is made of: rows ``[T, features]``, and for each of them the other factor's core rows
    ``[T, r * sum(k)]`` with their bits of activity ``[rank blocks, T]``."""

    rows: Tensor
    core: Tensor
    active: Tensor


@dataclass(frozen=True)
class Units:
    """dKbar of every row, ``[rank blocks, T, folded_size]``, and whose it is: ``groups [N]``, ``uses [G, S]``."""

    partial: Tensor
    groups: Tensor
    uses: Tensor | None
    num_groups: int


Partials = tuple[Tensor | None, Tensor | None, Tensor | None]


def factor_grad_partials(
    a: Side | None,
    b: Side | None,
    units: Units | None,
    plan: Plan,
    *,
    dropout: tuple[float, Tensor | None] = (0.0, None),
) -> Partials:
    """First stage for dA (``a``: x and dU), for dB (``b``: dy and V), and for dKbar of rows, at once; one at least.

    Returns:
        ``[spans, S, r, in]``, ``[spans, S, r, out]``, ``[spans, G, folded_size]``, fp32; None for what was not given.
    """
    given = a.rows if a is not None else b.rows if b is not None else units.partial
    total = given.shape[1 if given.dim() == 3 else 0]
    span, spans = row_spans(total)
    in_features = 0 if a is None else a.rows.shape[1]
    out_features = 0 if b is None else b.rows.shape[1]
    p_drop, seed = dropout
    sums = reduce_config()

    def partial(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=given.device)

    def start(config: Config) -> Partials:
        partial_a = None if a is None else partial(spans, len(plan.scales), plan.rank, in_features)
        partial_b = None if b is None else partial(spans, len(plan.scales), plan.rank, out_features)
        partial_folded = None if units is None else partial(spans, units.num_groups, plan.folded_size)
        launch(
            factor_grad_kernel,
            (
                triton.cdiv(max(in_features, out_features, 1), config["BLOCK_C"]),
                spans * plan.rank_blocks,
                (a is not None) + (b is not None) + (units is not None),
            ),
            *((None, None, None) if a is None else (a.rows, a.core, a.active)),
            partial_a,
            *((None, None, None) if b is None else (b.rows, b.core, b.active)),
            partial_b,
            *((None, None, None) if units is None else (units.partial, units.groups, units.uses)),
            partial_folded,
            seed,
            p_drop,
            total,
            1 if units is None else total // max(units.groups.shape[0], 1),
            span,
            spans,
            0 if units is None else units.num_groups,
            in_features,
            out_features,
            plan.rank,
            *((0, 0) if a is None else a.rows.stride()),
            *((0, 0) if b is None else b.rows.stride()),
            config=config,
            **plan.constants(),
            DROPOUT=p_drop > 0,
            PRECISION=dot_precision(given.dtype),
            BLOCK_U=sums["BLOCK_U"],
            BLOCK_F=sums["BLOCK_F"],
        )
        return partial_a, partial_b, partial_folded

    def key() -> tuple:
        sides = tuple(None if side is None else (side.rows.shape[1], *layout(side.rows)) for side in (a, b))
        return "factor_grad", sides, units is None, plan, given.dtype, row_bucket(total), p_drop > 0

    return start(choose(key, factor_grad_candidates(plan, given.dtype.itemsize, total), given.device, start))
