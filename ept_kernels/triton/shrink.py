"""Shrink and core, all scales in one read of the rows.

U_k = F_k X          F_k[(p, q), c] = factor[p, c // k] * (c % k == q)
V_k[p, a] = sum_q U_k[p, q] Kbar_k[a, q]             (backward: the transposed kernel, and dKbar = dV^T U)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import shrink_candidates
from .launch import FROM_BATCH, Config, launch
from .plan import Plan, Rows, rows_for
from .precision import dot_precision
from .tiles import block_columns, is_active, keep_mask, spread
from .tune import choose, layout, row_bucket


@triton.jit
def shrink_tile(
    rank_block,
    block,
    x_ptr,  # [T, features]
    factor_ptr,  # [rank, ceil(features / k_min)]
    folded_ptr,  # [G, FOLDED]
    groups_ptr,  # [segments] or None
    uses_ptr,  # [G, S] bool, whether a group uses a scale, or None
    u_ptr,  # [T, WIDTH] out, or None
    v_ptr,  # [T, WIDTH] out, or None; zeros for a scale that no row of the block uses
    active_ptr,  # [rank blocks, T] out: bit s is set where a row of V_k is not zero
    u_saved_ptr,  # [T, WIDTH] in: U of the forward pass, for dKbar
    partial_ptr,  # [rank blocks, units, FOLDED] out, or None: dKbar of every unit (a row block, or a row), as used
    seed_ptr,
    p_drop,
    rows_total,
    segment,
    blocks_per_segment,
    num_groups,
    every_scale,
    features,
    rank,
    units,
    stride_row,
    stride_feature,
    stride_p,
    stride_j,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDED: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SKIP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """U, V and partial dKbar of a block of rows and a block of ranks."""
    p0 = rank_block * RANK_BLOCK
    if ALIGNED:  # blocks start anew with every segment
        first = (block // blocks_per_segment).to(tl.int64) * segment
        end = first + segment
        rows = first + (block % blocks_per_segment) * BLOCK_T + tl.arange(0, BLOCK_T)
    else:
        end = tl.cast(rows_total, tl.int64)
        rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_exists = rows < end
    # A row whose group does not exist is NaN: no read out of bounds, nothing that waits for the host, and no result
    # that looks right.
    strange = 0
    if groups_ptr is None:
        group = tl.zeros((BLOCK_T,), tl.int64)
    else:
        group = tl.load(groups_ptr + tl.minimum(rows, end - 1) // segment).to(tl.int64)
        known = (group >= 0) & (group < num_groups)
        strange = tl.max((~known).to(tl.int32), 0)
        group = tl.where(known, group, 0)

    accumulators = ()
    wanted = ()
    for s in tl.static_range(len(SCALES)):
        accumulators = accumulators + (tl.zeros((BLOCK_T, RANKS[s] * SLOTS[s]), tl.float32),)
        if uses_ptr is not None:
            used = tl.max(tl.load(uses_ptr + group * len(SCALES) + s).to(tl.int32), 0)
        elif SKIP:  # one group a block: its folded kernel says which scales it uses
            used = is_active(folded_ptr + tl.max(group, 0) * FOLDED + OFFSETS[s], SCALES[s], SLOTS[s]).to(tl.int32)
        else:  # a branch that is always taken: without one, the scales' addresses fill the registers side by side
            used = (every_scale >> s) & 1
        wanted = wanted + (used + strange > 0,)

    channels = tl.arange(0, BLOCK_C)
    lines = x_ptr + rows[:, None] * stride_row
    following = tl.load(
        lines + channels[None, :].to(tl.int64) * stride_feature,
        mask=row_exists[:, None] & (channels < features)[None, :],
        other=0.0,
    )
    for c0 in range(0, features, BLOCK_C):
        x = following
        ahead = c0 + BLOCK_C + channels  # by hand: branches on inactive scales keep the compiler from pipelining
        following = tl.load(
            lines + ahead[None, :].to(tl.int64) * stride_feature,
            mask=row_exists[:, None] & (ahead < features)[None, :],
            other=0.0,
        )
        if DROPOUT:
            kept = keep_mask(tl.load(seed_ptr), rows, c0 + channels, p_drop)
            x = tl.where(kept, x.to(tl.float32) / (1.0 - p_drop), 0.0).to(x.dtype)
        updated = ()
        for s in tl.static_range(len(SCALES)):
            accumulator = accumulators[s]
            if wanted[s]:
                tile = spread(
                    factor_ptr,
                    stride_p,
                    stride_j,
                    p0,
                    c0,
                    rank,
                    features,
                    SCALES[s],
                    SLOTS[s],
                    RANKS[s],
                    BLOCK_C,
                    x.dtype,
                )
                accumulator = tl.dot(x, tl.trans(tile), accumulator, input_precision=PRECISION)
            updated = updated + (accumulator,)
        accumulators = updated

    # The loops over ``a`` are real ones: unrolled, those of scales 2 to 16 spill, and compile for minutes.
    bits = tl.zeros((BLOCK_T,), tl.int32)
    for s in tl.static_range(len(SCALES)):
        columns, exists = block_columns(p0, rank, SCALES[s], SLOTS[s], RANKS[s], RANK_BLOCK)
        inside = row_exists[:, None] & exists[None, :]
        place = rows[:, None] * WIDTH + COLUMNS[s] + columns[None, :]
        if wanted[s]:
            u = accumulators[s]
            if groups_ptr is not None:
                u = tl.where(known[:, None], u, float("nan"))
            if u_ptr is not None:
                tl.store(u_ptr + place, u.to(u_ptr.dtype.element_ty), mask=inside)
            slot = tl.arange(0, SLOTS[s])
            u3 = tl.reshape(u, (BLOCK_T, RANKS[s], SLOTS[s]))
            if v_ptr is not None:
                kernels = folded_ptr + group[:, None] * FOLDED + OFFSETS[s]
                p = tl.arange(0, RANKS[s])
                exists_p = (p < RANK_BLOCK) & (p0 + p < rank)
                nonzero = tl.zeros((BLOCK_T,), tl.int32)
                for a in range(SCALES[s]):
                    line = tl.load(
                        kernels + a * (1 if TRANSPOSE else SCALES[s]) + slot[None, :] * (SCALES[s] if TRANSPOSE else 1),
                        mask=row_exists[:, None] & (slot < SCALES[s])[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    v = tl.sum(u3 * line[:, None, :], 2)  # [BLOCK_T, RANKS[s]]
                    target = rows[:, None] * WIDTH + COLUMNS[s] + (p0 + p)[None, :] * SCALES[s] + a
                    tl.store(v_ptr + target, v.to(v_ptr.dtype.element_ty), mask=row_exists[:, None] & exists_p[None, :])
                    # a maximum would drop NaN; "not equal" sees it, and a row of NaN must reach the output
                    nonzero |= tl.max((v != 0).to(tl.int32), 1)
                bits += nonzero << s
            if partial_ptr is not None:
                saved = tl.load(u_saved_ptr + place, mask=inside, other=0.0).to(tl.float32)
                saved3 = tl.reshape(saved, (BLOCK_T, RANKS[s], SLOTS[s]))
                for a in range(SCALES[s]):
                    dv = tl.sum(tl.where((slot == a)[None, None, :], u3, 0.0), 2)  # [BLOCK_T, RANKS[s]]
                    dk = tl.sum(dv[:, :, None] * saved3, 1)  # [BLOCK_T, SLOTS[s]]
                    entry = OFFSETS[s] + a * SCALES[s] + slot
                    if ALIGNED:
                        line = (rank_block * units + block).to(tl.int64) * FOLDED
                        tl.store(partial_ptr + line + entry, tl.sum(dk, 0), mask=slot < SCALES[s])
                    else:
                        lines_out = (rank_block * units + rows)[:, None] * FOLDED
                        tl.store(
                            partial_ptr + lines_out + entry[None, :],
                            dk,
                            mask=row_exists[:, None] & (slot < SCALES[s])[None, :],
                        )
        elif v_ptr is not None:
            zeros = tl.zeros((BLOCK_T, RANKS[s] * SLOTS[s]), tl.float32)
            tl.store(v_ptr + place, zeros.to(v_ptr.dtype.element_ty), mask=inside)
    if v_ptr is not None:
        tl.store(active_ptr + rank_block.to(tl.int64) * rows_total + rows, bits, mask=row_exists)


@triton.jit(do_not_specialize=FROM_BATCH)
def shrink_kernel(
    x_ptr,
    factor_ptr,
    folded_ptr,
    groups_ptr,
    uses_ptr,
    u_ptr,
    v_ptr,
    active_ptr,
    u_saved_ptr,
    partial_ptr,
    seed_ptr,
    p_drop,
    rows_total,
    segment,
    blocks_per_segment,
    num_groups,
    every_scale,
    features,
    rank,
    units,
    stride_row,
    stride_feature,
    stride_p,
    stride_j,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDED: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SKIP: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one axis, because the others end at 65535; neighbours share their rows
    rank_blocks = tl.cdiv(rank, RANK_BLOCK)
    shrink_tile(
        tl.program_id(0) % rank_blocks,
        tl.program_id(0) // rank_blocks,
        x_ptr,
        factor_ptr,
        folded_ptr,
        groups_ptr,
        uses_ptr,
        u_ptr,
        v_ptr,
        active_ptr,
        u_saved_ptr,
        partial_ptr,
        seed_ptr,
        p_drop,
        rows_total,
        segment,
        blocks_per_segment,
        num_groups,
        every_scale,
        features,
        rank,
        units,
        stride_row,
        stride_feature,
        stride_p,
        stride_j,
        SCALES,
        SLOTS,
        RANKS,
        COLUMNS,
        OFFSETS,
        WIDTH,
        FOLDED,
        RANK_BLOCK,
        ALIGNED,
        SKIP,
        TRANSPOSE,
        DROPOUT,
        PRECISION,
        BLOCK_T,
        BLOCK_C,
    )


def core_outputs(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Room for V ``[T, r * sum(k)]`` in the dtype of x, and for its bits of activity ``[rank blocks, T]``."""
    total = x.shape[0]
    active = torch.empty(plan.rank_blocks, total, dtype=torch.int32, device=x.device)
    return x.new_empty(total, plan.width), active


def folded_partials(x: Tensor, plan: Plan, rows: Rows) -> Tensor:
    """Room for the folded kernels' gradient of every unit, ``[rank blocks, units, folded_size]`` fp32."""
    return torch.empty(plan.rank_blocks, rows.units, plan.folded_size, dtype=torch.float32, device=x.device)


def shrink(
    x: Tensor,
    factor: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    plan: Plan,
    *,
    transpose: bool = False,
    skip: bool = False,
    uses: Tensor | None = None,
    keep_u: bool = False,
    keep_v: bool = True,
    u_saved: Tensor | None = None,
    dropout: tuple[float, Tensor | None] = (0.0, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Rows]:
    """Down-project rows and apply each group's core.

    Args:
        x: ``[T, features]``, any strides.
        factor: ``[r, ceil(features / k_min)]`` by strides: A for the forward pass, B transposed for the backward.
        folded: ``[G, folded_size]``. groups: ``[N]`` or None.
        transpose: multiply by the transposed kernels (dU from dV).
        skip: leave out scales whose kernel is zero; only where nobody needs their U or dV.
        uses: ``[G, S]`` bool, contiguous, or None: leave out scales that a group does not use; the kernels need not be
            looked at then.
        keep_u, keep_v: which results to store.
        u_saved: ``[T, r * sum(k)]``; then x is dy and the gradient of the folded kernels is wanted.
        dropout: probability and the seed ``[1]`` int64 that decides which entries of x are dropped.

    Returns:
        ``(U, V, active, partial, rows)``: ``[T, r * sum(k)]`` in the dtype of x; ``[rank blocks, T]`` int32 bits of the
        scales in which a row of V is not zero; ``[rank blocks, units, folded_size]`` fp32; the tiling that says what a
        unit is. None for what was not asked. U and partial are not written for a scale that no row of a block uses.
    """
    total, features = x.shape
    segments = 1 if groups is None else groups.shape[0]
    p_drop, seed = dropout

    def start(config: Config) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Rows]:
        rows = rows_for(total, segments, config["BLOCK_T"])
        u = x.new_empty(total, plan.width) if keep_u else None
        v, active = core_outputs(x, plan) if keep_v else (None, None)
        partial = None if u_saved is None else folded_partials(x, plan, rows)
        launch(
            shrink_kernel,
            (plan.rank_blocks * rows.blocks,),
            x,
            factor,
            folded,
            groups,
            uses,
            u,
            v,
            active,
            u_saved,
            partial,
            seed,
            p_drop,
            total,
            rows.segment,
            rows.blocks_per_segment,
            folded.shape[0],
            plan.every_scale,
            features,
            plan.rank,
            rows.units,
            *x.stride(),
            *factor.stride(),
            config=config,
            **plan.constants(),
            ALIGNED=rows.aligned,
            SKIP=skip and uses is None and rows.aligned,
            TRANSPOSE=transpose,
            DROPOUT=p_drop > 0,
            PRECISION=dot_precision(x.dtype),
        )
        return u, v, active, partial, rows

    def key() -> tuple:
        switches = (segments > 1, skip, uses is not None, u_saved is not None, p_drop > 0)
        return "shrink", features, plan, x.dtype, row_bucket(total), layout(x), switches

    return start(choose(key, shrink_candidates(plan, x.dtype.itemsize, total, p_drop > 0), x.device, start))
