"""Shrink, base product and expansion in a single launch: the rows are read from memory once.

Programs take tickets. A strip of row blocks is shrunk by programs whose tickets come before those of the programs that
multiply the strip before it, so a strip's V is ready, and its rows are in L2, when its products need them:

    shrink strip 0 | shrink strip 1, multiply strip 0 | shrink strip 2, multiply strip 1 | ...

A product's epilogue waits on the flags of the shrink tiles of its rows. It cannot wait for ever: a lower ticket belongs
to a program that has started, and shrink tiles wait for nobody.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import single_candidates
from .expand import add_expanded
from .launch import FROM_BATCH, Config, launch
from .linear import base_product
from .plan import Plan, Rows, rows_for
from .precision import dot_precision
from .shrink import core_outputs, folded_partials, shrink_tile
from .tiles import keep_mask
from .tune import choose, layout, row_bucket


@triton.jit(do_not_specialize=FROM_BATCH)
def single_kernel(
    x_ptr,  # [T, inner]
    weight_ptr,  # [features, inner] by strides
    bias_ptr,  # [features] or None
    y_ptr,  # [T, features], contiguous
    down_ptr,  # [rank, ceil(inner / k_min)]: shrinks
    up_ptr,  # [rank, ceil(features / k_min)]: expands
    folded_ptr,  # [G, FOLDED]
    groups_ptr,  # [segments] or None
    uses_ptr,  # [G, S] bool or None
    v_ptr,  # [T, WIDTH]
    active_ptr,  # [rank blocks, T]
    u_saved_ptr,  # [T, WIDTH] or None
    partial_ptr,  # [rank blocks, units, FOLDED] or None
    seed_ptr,
    sync_ptr,  # [1 + shrink tiles] int32, zeros: the next ticket, and a flag for every finished shrink tile
    p_drop,
    rows_total,
    segment,
    blocks_per_segment,
    shrink_blocks,
    num_groups,
    every_scale,
    rank_blocks,
    inner,
    features,
    rank,
    units,
    stride_row,
    stride_inner,
    stride_weight_feature,
    stride_weight_inner,
    down_stride_p,
    down_stride_j,
    up_stride_p,
    up_stride_j,
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
    DROP_IN: tl.constexpr,
    DROP_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SHRINK_T: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    ticket = tl.atomic_add(sync_ptr, 1)
    column_blocks = tl.cdiv(features, BLOCK_C)
    shrinks = GROUP_T * (BLOCK_T // SHRINK_T) * rank_blocks  # programs of a strip; the last strip leaves some idle
    products = GROUP_T * column_blocks
    later = ticket - shrinks
    strip = tl.where(later < 0, -1, later // (shrinks + products))
    within = tl.where(later < 0, ticket, later % (shrinks + products))
    if within < shrinks:
        tile = (strip + 1) * shrinks + within
        block = tile // rank_blocks
        if block < shrink_blocks:
            shrink_tile(
                tile % rank_blocks,
                block,
                x_ptr,
                down_ptr,
                folded_ptr,
                groups_ptr,
                uses_ptr,
                None,
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
                inner,
                rank,
                units,
                stride_row,
                stride_inner,
                down_stride_p,
                down_stride_j,
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
                DROP_IN,
                PRECISION,
                SHRINK_T,
                BLOCK_I,
            )
            tl.debug_barrier()  # every thread's stores come before the flag
            tl.atomic_xchg(sync_ptr + 1 + tile, 1, sem="release")
    else:
        within = within - shrinks
        row_block, column_block = strip * GROUP_T + within % GROUP_T, within // GROUP_T
        if row_block * BLOCK_T < rows_total:
            rows = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            c0 = column_block * BLOCK_C
            columns = c0 + tl.arange(0, BLOCK_C)
            row_exists, column_exists = rows < rows_total, columns < features
            accumulator = base_product(
                tl.zeros((BLOCK_T, BLOCK_C), tl.float32),
                x_ptr,
                weight_ptr,
                bias_ptr,
                rows,
                row_exists,
                columns,
                column_exists,
                inner,
                stride_row,
                stride_inner,
                stride_weight_feature,
                stride_weight_inner,
                PRECISION,
                BLOCK_I,
            )
            first = row_block * (BLOCK_T // SHRINK_T)
            last = tl.minimum(first + BLOCK_T // SHRINK_T, shrink_blocks)
            for tile in range(first * rank_blocks, last * rank_blocks):
                while tl.atomic_add(sync_ptr + 1 + tile, 0, sem="acquire") == 0:
                    pass
            if DROP_OUT:
                base = accumulator
                accumulator = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            accumulator = add_expanded(
                accumulator,
                v_ptr,
                active_ptr,
                up_ptr,
                rows,
                row_exists,
                c0,
                rows_total,
                features,
                rank,
                up_stride_p,
                up_stride_j,
                SCALES,
                SLOTS,
                RANKS,
                COLUMNS,
                WIDTH,
                RANK_BLOCK,
                PRECISION,
                BLOCK_C,
            )
            if DROP_OUT:
                kept = keep_mask(tl.load(seed_ptr), rows, columns, p_drop)
                accumulator = base + tl.where(kept, accumulator / (1.0 - p_drop), 0.0)
            place = y_ptr + rows[:, None] * features + columns[None, :]
            inside = row_exists[:, None] & column_exists[None, :]
            tl.store(place, accumulator.to(y_ptr.dtype.element_ty), mask=inside)


def shrink_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    plan: Plan,
    *,
    transpose: bool = False,
    skip: bool = False,
    uses: Tensor | None = None,
    u_saved: Tensor | None = None,
    dropout: tuple[float, Tensor | None] = (0.0, None),
    drop_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Rows]:
    """What ``shrink`` and ``linear`` compute, in one launch (and one to clear its flags).

    Args:
        x: ``[T, inner]``, weight: ``[features, inner]``, any strides. bias: ``[features]``, contiguous, or None.
        down: ``[r, ceil(inner / k_min)]``, up: ``[r, ceil(features / k_min)]``, by strides.
        drop_output: dropout acts on the expanded rows (backward) and not on the rows that are shrunk (forward).
        folded, groups, transpose, skip, uses, u_saved: as in ``shrink``.

    Returns:
        ``(y, V, active, partial, rows)``: as ``linear`` and ``shrink``.
    """
    total, inner = x.shape
    features = weight.shape[0]
    segments = 1 if groups is None else groups.shape[0]
    p_drop, seed = dropout

    def start(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Rows]:
        rows = rows_for(total, segments, config["SHRINK_T"], regular=True)
        y = x.new_empty(total, features)
        v, active = core_outputs(x, plan)
        partial = None if u_saved is None else folded_partials(x, plan, rows)
        strips = triton.cdiv(total, config["BLOCK_T"] * config["GROUP_T"])
        shrinks = config["GROUP_T"] * (config["BLOCK_T"] // config["SHRINK_T"]) * plan.rank_blocks
        products = config["GROUP_T"] * triton.cdiv(features, config["BLOCK_C"])
        sync = torch.zeros(1 + strips * shrinks, dtype=torch.int32, device=x.device)
        launch(
            single_kernel,
            ((shrinks + strips * (shrinks + products)) if strips else 0,),
            x,
            weight,
            bias,
            y,
            down,
            up,
            folded,
            groups,
            uses,
            v,
            active,
            u_saved,
            partial,
            seed,
            sync,
            p_drop,
            total,
            rows.segment,
            rows.blocks_per_segment,
            rows.blocks,
            folded.shape[0],
            plan.every_scale,
            plan.rank_blocks,
            inner,
            features,
            plan.rank,
            rows.units,
            *x.stride(),
            *weight.stride(),
            *down.stride(),
            *up.stride(),
            config=config,
            **plan.constants(),
            ALIGNED=rows.aligned,
            SKIP=skip and uses is None and rows.aligned,
            TRANSPOSE=transpose,
            DROP_IN=p_drop > 0 and not drop_output,
            DROP_OUT=p_drop > 0 and drop_output,
            PRECISION=dot_precision(x.dtype),
        )
        return y, v, active, partial, rows

    def key() -> tuple:
        switches = (segments > 1, skip, uses is not None, u_saved is not None, p_drop > 0, drop_output)
        return "single", inner, features, plan, x.dtype, row_bucket(total), weight.stride(), layout(x), switches

    return start(choose(key, single_candidates(plan, x.dtype.itemsize, total), x.device, start))
