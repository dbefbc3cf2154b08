"""Expand: the up-projection of core outputs, written or added to the output of any base layer.

y[t, c] (+)= sum_k sum_{p, a} V_k[t, p, a] F_k[(p, a), c]      F_k[(p, a), c] = factor[p, c // k] * (c % k == a)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import expand_candidates
from .launch import FROM_BATCH, Config, launch
from .plan import Plan
from .precision import dot_precision
from .tiles import block_columns, keep_mask, spread
from .tune import choose, row_bucket


@triton.jit
def add_expanded(
    accumulator,  # [BLOCK_T, BLOCK_C] fp32
    v_ptr,
    active_ptr,
    factor_ptr,
    rows,
    row_exists,
    c0,
    rows_total,
    features,
    rank,
    stride_p,
    stride_j,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the expanded rows of V to a tile; scales in which all of its rows are zero are skipped."""
    for p0 in range(0, rank, RANK_BLOCK):
        bits = tl.load(active_ptr + rows + (p0 // RANK_BLOCK) * tl.cast(rows_total, tl.int64), mask=row_exists, other=0)
        for s in tl.static_range(len(SCALES)):
            if tl.max((bits >> s) & 1, 0) > 0:
                columns, exists = block_columns(p0, rank, SCALES[s], SLOTS[s], RANKS[s], RANK_BLOCK)
                v = tl.load(
                    v_ptr + rows[:, None] * WIDTH + COLUMNS[s] + columns[None, :],
                    mask=row_exists[:, None] & exists[None, :],
                    other=0.0,
                )
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
                    v.dtype,
                )
                accumulator = tl.dot(v, tile, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=FROM_BATCH)
def expand_kernel(
    y_ptr,  # [T, features], contiguous
    v_ptr,  # [T, WIDTH]
    active_ptr,  # [rank blocks, T] bits
    factor_ptr,  # [rank, ceil(features / k_min)]
    seed_ptr,
    p_drop,
    rows_total,
    features,
    rank,
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
    ACCUMULATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c0 = tl.program_id(1) * BLOCK_C
    columns = c0 + tl.arange(0, BLOCK_C)
    row_exists = rows < rows_total
    accumulator = add_expanded(
        tl.zeros((BLOCK_T, BLOCK_C), tl.float32),
        v_ptr,
        active_ptr,
        factor_ptr,
        rows,
        row_exists,
        c0,
        rows_total,
        features,
        rank,
        stride_p,
        stride_j,
        SCALES,
        SLOTS,
        RANKS,
        COLUMNS,
        WIDTH,
        RANK_BLOCK,
        PRECISION,
        BLOCK_C,
    )
    if DROPOUT:
        kept = keep_mask(tl.load(seed_ptr), rows, columns, p_drop)
        accumulator = tl.where(kept, accumulator / (1.0 - p_drop), 0.0)
    place = y_ptr + rows[:, None] * features + columns[None, :]
    inside = row_exists[:, None] & (columns < features)[None, :]
    if ACCUMULATE:
        accumulator += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, accumulator.to(y_ptr.dtype.element_ty), mask=inside)


def expand(
    y: Tensor,
    v: Tensor,
    active: Tensor,
    factor: Tensor,
    plan: Plan,
    *,
    accumulate: bool,
    dropout: tuple[float, Tensor | None] = (0.0, None),
) -> Tensor:
    """Write, or with ``accumulate`` add, the expanded rows of V to y, in place.

    Args:
        y: ``[T, features]``, contiguous. v: ``[T, r * sum(k)]`` and active: ``[rank blocks, T]``, from ``shrink``.
        factor: ``[r, ceil(features / k_min)]`` by strides: B transposed for the output, A for the gradient of x.
        dropout: the mask to replay on the expanded rows (gradient of a dropped x).
    """
    total, features = y.shape
    p_drop, seed = dropout

    def start(config: Config, target: Tensor) -> None:
        launch(
            expand_kernel,
            (triton.cdiv(total, config["BLOCK_T"]), triton.cdiv(features, config["BLOCK_C"])),
            target,
            v,
            active,
            factor,
            seed,
            p_drop,
            total,
            features,
            plan.rank,
            *factor.stride(),
            config=config,
            **plan.constants(),
            ACCUMULATE=accumulate,
            DROPOUT=p_drop > 0,
            PRECISION=dot_precision(y.dtype),
        )

    def key() -> tuple:
        return "expand", features, plan, y.dtype, row_bucket(total), accumulate, p_drop > 0

    candidates = expand_candidates(plan, y.dtype.itemsize, total)
    start(choose(key, candidates, y.device, lambda config: start(config, torch.empty_like(y))), y)
    return y
