"""Gradients of the seed's factors, dA from (dU, x) and dB from (V, dy), in two deterministic stages.

D_k[p, c] = sum_t W_k[t, p, c % k] rows[t, c]        first stage: partial sums over spans of rows
dF[p, j]  = sum_k sum_{q < k} D_k[p, j k + q]        second stage (``reduce.py``): spans, scales and slots
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import factor_grad_candidates, row_spans
from .launch import FROM_BATCH, Config, launch
from .plan import Plan
from .precision import dot_precision
from .tiles import block_columns, keep_mask
from .tune import choose, row_bucket


@triton.jit
def span_sums(
    rows_ptr,
    core_ptr,
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
):
    """One program's D_k: a block of channels, a span of rows, a block of ranks."""
    c0 = tl.program_id(0) * BLOCK_C
    if c0 < features:
        rank_blocks = tl.cdiv(rank, RANK_BLOCK)
        index = tl.program_id(1)
        p0 = (index % rank_blocks) * RANK_BLOCK
        part = index // rank_blocks
        start = part.to(tl.int64) * span
        end = tl.minimum(start + span, rows_total)
        channels = c0 + tl.arange(0, BLOCK_C)
        channel_exists = channels < features
        accumulators = ()
        for s in tl.static_range(len(SCALES)):
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
            for s in tl.static_range(len(SCALES)):
                columns, exists = block_columns(p0, rank, SCALES[s], SLOTS[s], RANKS[s], RANK_BLOCK)
                core = tl.load(
                    core_ptr + lines[None, :] * WIDTH + COLUMNS[s] + columns[:, None],
                    mask=line_exists[None, :] & exists[:, None],
                    other=0.0,
                )
                updated = updated + (tl.dot(core, x, accumulators[s], input_precision=PRECISION),)
            accumulators = updated
        for s in tl.static_range(len(SCALES)):
            slot = tl.arange(0, SLOTS[s])
            own = slot[None, :, None] == (channels % SCALES[s])[None, None, :]
            blocks = tl.reshape(accumulators[s], (RANKS[s], SLOTS[s], BLOCK_C))
            sums = tl.sum(tl.where(own, blocks, 0.0), 1)  # [RANKS[s], BLOCK_C]
            p = tl.arange(0, RANKS[s])
            exists_p = (p < RANK_BLOCK) & (p0 + p < rank)
            line = (part * len(SCALES) + s).to(tl.int64) * rank + (p0 + p)
            tl.store(
                partial_ptr + line[:, None] * features + channels[None, :],
                sums,
                mask=exists_p[:, None] & channel_exists[None, :],
            )


@triton.jit(do_not_specialize=FROM_BATCH)
def factor_grad_kernel(
    x_ptr,  # [T, in] or None
    du_ptr,  # [T, WIDTH]
    partial_a_ptr,  # [spans, S, rank, in] out
    dy_ptr,  # [T, out] or None
    v_ptr,  # [T, WIDTH]
    partial_b_ptr,  # [spans, S, rank, out] out
    seed_ptr,
    p_drop,
    rows_total,
    span,
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
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    side = tl.program_id(2)
    if x_ptr is not None:
        if side == 0:
            span_sums(
                x_ptr,
                du_ptr,
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
            )
    if dy_ptr is not None:
        if side == (1 if x_ptr is not None else 0):
            span_sums(
                dy_ptr,
                v_ptr,
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
            )


def factor_grad_partials(
    x: Tensor | None,
    du: Tensor | None,
    dy: Tensor | None,
    v: Tensor | None,
    plan: Plan,
    *,
    dropout: tuple[float, Tensor | None] = (0.0, None),
) -> tuple[Tensor | None, Tensor | None]:
    """First stage for dA (from x ``[T, in]`` and dU ``[T, r * sum(k)]``), for dB (from dy and V), or for both at once.

    Returns:
        ``(partial_a, partial_b)``: ``[spans, S, r, in]`` and ``[spans, S, r, out]`` fp32, None for what was not given.
    """
    given = x if x is not None else dy
    total = given.shape[0]
    span, spans = row_spans(total)
    in_features = 0 if x is None else x.shape[1]
    out_features = 0 if dy is None else dy.shape[1]
    p_drop, seed = dropout

    def partial(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        shape = (spans, len(plan.scales), plan.rank, rows.shape[1])
        return torch.empty(shape, dtype=torch.float32, device=rows.device)

    def start(config: Config) -> tuple[Tensor | None, Tensor | None]:
        partial_a, partial_b = partial(x), partial(dy)
        launch(
            factor_grad_kernel,
            (
                triton.cdiv(max(in_features, out_features), config["BLOCK_C"]),
                spans * plan.rank_blocks,
                (x is not None) + (dy is not None),
            ),
            x,
            du,
            partial_a,
            dy,
            v,
            partial_b,
            seed,
            p_drop,
            total,
            span,
            in_features,
            out_features,
            plan.rank,
            *((0, 0) if x is None else x.stride()),
            *((0, 0) if dy is None else dy.stride()),
            config=config,
            **plan.constants(),
            DROPOUT=p_drop > 0,
            PRECISION=dot_precision(given.dtype),
        )
        return partial_a, partial_b

    key = ("factor_grad", in_features, out_features, plan, given.dtype, row_bucket(total))
    return start(choose(key, factor_grad_candidates(plan, given.dtype.itemsize, total), given.device, start))
