"""The base product, its accumulator begun with the expansion: one launch, y written once.

y = x W^T + b + sum_k V_k F_k              (backward: dx = dy W + sum_k dU_k F_k, W read by its other stride)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import linear_candidates
from .expand import add_expanded
from .launch import FROM_BATCH, Config, launch
from .plan import Plan
from .precision import dot_precision
from .tiles import keep_mask
from .tune import choose, layout, row_bucket


@triton.jit
def base_product(
    accumulator,  # [BLOCK_T, BLOCK_C] fp32
    x_ptr,  # [T, inner]
    weight_ptr,  # [features, inner] by strides
    bias_ptr,  # [features] or None
    rows,
    row_exists,
    columns,
    column_exists,
    inner,
    stride_row,
    stride_inner,
    stride_weight_feature,
    stride_weight_inner,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Add a tile of ``x W^T + b``."""
    channels = tl.arange(0, BLOCK_I)
    x_lines = x_ptr + rows[:, None] * stride_row
    weight_lines = weight_ptr + columns[None, :].to(tl.int64) * stride_weight_feature
    for i0 in range(0, inner, BLOCK_I):
        i = (i0 + channels).to(tl.int64)
        channel_exists = i < inner
        x = tl.load(x_lines + i[None, :] * stride_inner, mask=row_exists[:, None] & channel_exists[None, :], other=0.0)
        weight = tl.load(
            weight_lines + i[:, None] * stride_weight_inner,
            mask=channel_exists[:, None] & column_exists[None, :],
            other=0.0,
        )
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION)
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)[None, :]
    return accumulator


@triton.jit(do_not_specialize=FROM_BATCH)
def linear_kernel(
    x_ptr,  # [T, INNER]
    weight_ptr,  # [features, INNER] by strides
    bias_ptr,  # [features] or None
    y_ptr,  # [T, features], contiguous
    v_ptr,  # [T, WIDTH]
    active_ptr,  # [rank blocks, T] bits
    factor_ptr,  # [rank, ceil(features / k_min)]
    seed_ptr,
    p_drop,
    rows_total,
    inner,
    features,
    rank,
    stride_row,
    stride_inner,
    stride_weight_feature,
    stride_weight_inner,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # Programs walk down GROUP_T row blocks before the next column block, so that their tiles of x and W stay in L2.
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows_total, BLOCK_T), tl.cdiv(features, BLOCK_C)
    strip = program // (GROUP_T * column_blocks)
    height = tl.minimum(row_blocks - strip * GROUP_T, GROUP_T)
    within = program % (GROUP_T * column_blocks)
    row_block, column_block = strip * GROUP_T + within % height, within // height

    rows = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c0 = column_block * BLOCK_C
    columns = c0 + tl.arange(0, BLOCK_C)
    row_exists, column_exists = rows < rows_total, columns < features
    # The expansion comes first: its mask leaves the base alone, and a second accumulator does not fit the registers.
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
    accumulator = base_product(
        accumulator,
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
    place = y_ptr + rows[:, None] * features + columns[None, :]
    tl.store(place, accumulator.to(y_ptr.dtype.element_ty), mask=row_exists[:, None] & column_exists[None, :])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    active: Tensor,
    factor: Tensor,
    plan: Plan,
    *,
    dropout: tuple[float, Tensor | None] = (0.0, None),
) -> Tensor:
    """``x @ weight.T + bias`` and the expanded rows of V, ``[T, features]`` in the dtype of x.

    Args:
        x: ``[T, inner]``, weight: ``[features, inner]``, any strides. bias: ``[features]``, contiguous, or None.
        v, active, factor, dropout: as in ``expand``.
    """
    total, inner = x.shape
    features = weight.shape[0]
    p_drop, seed = dropout

    def start(config: Config) -> Tensor:
        y = x.new_empty(total, features)
        launch(
            linear_kernel,
            (triton.cdiv(total, config["BLOCK_T"]) * triton.cdiv(features, config["BLOCK_C"]),),
            x,
            weight,
            bias,
            y,
            v,
            active,
            factor,
            seed,
            p_drop,
            total,
            inner,
            features,
            plan.rank,
            *x.stride(),
            *weight.stride(),
            *factor.stride(),
            config=config,
            **plan.constants(),
            DROPOUT=p_drop > 0,
            PRECISION=dot_precision(x.dtype),
        )
        return y

    drops = p_drop > 0

    def key() -> tuple:
        return "linear", inner, features, plan, x.dtype, row_bucket(total), weight.stride(), layout(x), drops

    narrow = inner % 16 != 0 or features % 16 != 0
    candidates = linear_candidates(plan, x.dtype.itemsize, total, drops, narrow)
    return start(choose(key, candidates, x.device, start))
