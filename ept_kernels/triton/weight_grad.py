"""Gradients of the dense updates, dA, dB and dKbar from dW ``[G, out, in]``, in two deterministic stages.

E_k[(p, a), i] = sum_o B[o // k, p] (o % k == a) dW[o, i]
dA[p, j]       = sum_{q < k} sum_a Kbar_k[a, q] E_k[(p, a), j k + q]
dKbar_k[a, q]  = sum_p sum_{i % k == q} A[p, i // k] E_k[(p, a), i]

dB is dA of the transposed problem. The first stage ends with dA's sum over ``a`` and dKbar's sums over a block of
channels, for a span of o; the second (``reduce.py``) adds spans, scales, slots and blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import WEIGHT_SPAN, weight_grad_candidates
from .launch import FROM_BATCH, Config, launch
from .plan import Plan, plan_for
from .precision import dot_precision
from .reduce import reduce_gradients
from .target import on_its_device
from .tiles import is_active, spread
from .tune import choose, layout


@triton.jit
def channel_sums(
    grad_ptr,  # [G, inner, features] by strides
    factor_ptr,  # [rank, ceil(inner / k_min)]: the factor of the dimension that is summed
    other_ptr,  # [rank, ceil(features / k_min)]: the factor whose gradient is wanted
    folded_ptr,  # [G, FOLDED], at this scale's first entry
    partial_ptr,  # [G * spans, S, rank, features], or None
    partial_folded_ptr,  # [rank blocks, G * spans * channel blocks, FOLDED], at this scale's first entry, or None
    scale,
    num_scales,
    num_groups,
    inner,
    features,
    rank,
    stride_group,
    stride_inner,
    stride_feature,
    factor_stride_p,
    factor_stride_j,
    other_stride_p,
    other_stride_j,
    K: tl.constexpr,
    SLOT: tl.constexpr,
    RANK: tl.constexpr,
    FOLDED: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    STRIDE_LINE: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program's sums: one scale, a block of channels, a span of one group's lines, a block of ranks.

    ``STRIDE_LINE``, ``STRIDE_CHANNEL``: steps in a folded kernel from one line, and one channel, to the next.
    """
    spans, channel_blocks, rank_blocks = tl.cdiv(inner, SPAN), tl.cdiv(features, BLOCK_C), tl.cdiv(rank, RANK_BLOCK)
    program = tl.program_id(0) // num_scales
    channel_block, rest = program % channel_blocks, program // channel_blocks
    rank_block, part = rest % rank_blocks, rest // rank_blocks
    group = part // spans
    if group < num_groups:
        kernel_ptr = folded_ptr + group.to(tl.int64) * FOLDED
        p0, start = rank_block * RANK_BLOCK, (part % spans) * SPAN
        end = tl.minimum(start + SPAN, inner)
        if partial_folded_ptr is None:  # a zero kernel gives its factors no gradient, but has one itself
            end = tl.where(is_active(kernel_ptr, K, SLOT), end, start)
        channels = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
        channel_exists = channels < features
        grad_columns = grad_ptr + group.to(tl.int64) * stride_group + channels[None, :].to(tl.int64) * stride_feature
        accumulator = tl.zeros((RANK * SLOT, BLOCK_C), tl.float32)
        for t0 in range(start, end, BLOCK_T):
            lines = t0 + tl.arange(0, BLOCK_T)
            grad = tl.load(
                grad_columns + lines[:, None].to(tl.int64) * stride_inner,
                mask=(lines < inner)[:, None] & channel_exists[None, :],
                other=0.0,
            )
            tile = spread(
                factor_ptr, factor_stride_p, factor_stride_j, p0, t0, rank, inner, K, SLOT, RANK, BLOCK_T, grad.dtype
            )
            accumulator = tl.dot(tile, grad, accumulator, input_precision=PRECISION)
        sums = tl.reshape(accumulator, (RANK, SLOT, BLOCK_C))
        slot = tl.arange(0, SLOT)
        p = tl.arange(0, RANK)
        p_exists = (p < RANK_BLOCK) & (p0 + p < rank)
        inside = p_exists[:, None] & channel_exists[None, :]
        if partial_ptr is not None:
            kernel = tl.load(
                kernel_ptr + slot[:, None] * STRIDE_LINE + (channels % K)[None, :] * STRIDE_CHANNEL,
                mask=(slot < K)[:, None] & channel_exists[None, :],
                other=0.0,
            ).to(tl.float32)
            line = (part * num_scales + scale).to(tl.int64) * rank + (p0 + p)
            place = partial_ptr + line[:, None] * features + channels[None, :]
            tl.store(place, tl.sum(sums * kernel[None, :, :], 1), mask=inside)
        if partial_folded_ptr is not None:
            other = tl.load(
                other_ptr
                + (p0 + p)[:, None].to(tl.int64) * other_stride_p
                + (channels // K)[None, :].to(tl.int64) * other_stride_j,
                mask=inside,
                other=0.0,
            ).to(tl.float32)
            products = tl.sum(sums * other[:, None, :], 0)  # [SLOT, BLOCK_C]
            unit = (rank_block * num_groups * spans + part).to(tl.int64) * channel_blocks + channel_block
            entries = partial_folded_ptr + unit * FOLDED + slot * STRIDE_LINE
            for q in range(K):
                of_slot = tl.sum(tl.where((channels % K == q)[None, :], products, 0.0), 1)
                tl.store(entries + q * STRIDE_CHANNEL, of_slot, mask=slot < K)


@triton.jit(do_not_specialize=FROM_BATCH)
def weight_grad_kernel(
    grad_ptr,  # [G, out, in] by strides
    a_ptr,  # [rank, ceil(in / k_min)]
    b_ptr,  # [ceil(out / k_min), rank]
    folded_ptr,  # [G, FOLDED]
    partial_a_ptr,  # [G * spans of out, S, rank, in] out, or None
    partial_b_ptr,  # [G * spans of in, S, rank, out] out, or None
    partial_folded_ptr,  # [rank blocks, units, FOLDED] out, or None
    num_groups,
    in_features,
    out_features,
    rank,
    grad_stride_group,
    grad_stride_out,
    grad_stride_in,
    a_stride_p,
    a_stride_j,
    b_stride_j,
    b_stride_p,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FOLDED: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BY_COLUMN: tl.constexpr,  # sums over o for every i: dA, and dKbar unless dB alone comes along
    BY_ROW: tl.constexpr,  # sums over i for every o: dB
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Scales run fastest: they read the same tiles of dW, from L2 all but once. One scale a program keeps accumulators
    # in registers whatever the pyramid, and leaves the others' work undone where a scale is inactive.
    scale, side = tl.program_id(0) % len(SCALES), tl.program_id(1)
    for s in tl.static_range(len(SCALES)):
        if BY_COLUMN:
            if (scale == s) & (side == 0):
                channel_sums(
                    grad_ptr,
                    b_ptr,
                    a_ptr,
                    folded_ptr + OFFSETS[s],
                    partial_a_ptr,
                    None if partial_folded_ptr is None else partial_folded_ptr + OFFSETS[s],
                    s,
                    len(SCALES),
                    num_groups,
                    out_features,
                    in_features,
                    rank,
                    grad_stride_group,
                    grad_stride_out,
                    grad_stride_in,
                    b_stride_p,
                    b_stride_j,
                    a_stride_p,
                    a_stride_j,
                    SCALES[s],
                    SLOTS[s],
                    RANKS[s],
                    FOLDED,
                    RANK_BLOCK,
                    SCALES[s],
                    1,
                    SPAN,
                    PRECISION,
                    BLOCK_T,
                    BLOCK_C,
                )
        if BY_ROW:
            if (scale == s) & (side == (1 if BY_COLUMN else 0)):
                channel_sums(
                    grad_ptr,
                    a_ptr,
                    b_ptr,
                    folded_ptr + OFFSETS[s],
                    partial_b_ptr,
                    None if BY_COLUMN or partial_folded_ptr is None else partial_folded_ptr + OFFSETS[s],
                    s,
                    len(SCALES),
                    num_groups,
                    in_features,
                    out_features,
                    rank,
                    grad_stride_group,
                    grad_stride_in,
                    grad_stride_out,
                    a_stride_p,
                    a_stride_j,
                    b_stride_p,
                    b_stride_j,
                    SCALES[s],
                    SLOTS[s],
                    RANKS[s],
                    FOLDED,
                    RANK_BLOCK,
                    1,
                    SCALES[s],
                    SPAN,
                    PRECISION,
                    BLOCK_T,
                    BLOCK_C,
                )


Partials = tuple[Tensor | None, Tensor | None, Tensor | None]


def _partials(grad: Tensor, A: Tensor, B: Tensor, folded: Tensor, plan: Plan, needs: Sequence[bool]) -> Partials:
    """First stage: partial sums of dA, dB and dKbar as ``reduce_gradients`` takes them, None for what is not needed."""
    need_A, need_B, need_folded = needs
    groups, out_features, in_features = grad.shape
    by_column, by_row = need_A or not need_B, need_B
    out_parts, in_parts = (groups * triton.cdiv(size, WEIGHT_SPAN) for size in (out_features, in_features))

    def partial(needed: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=grad.device) if needed else None

    def start(config: Config) -> Partials:
        column_units = out_parts * triton.cdiv(in_features, config["BLOCK_C"])
        row_units = in_parts * triton.cdiv(out_features, config["BLOCK_C"])
        partial_a = partial(need_A, out_parts, len(plan.scales), plan.rank, in_features)
        partial_b = partial(need_B, in_parts, len(plan.scales), plan.rank, out_features)
        units = column_units if by_column else row_units
        partial_folded = partial(need_folded, plan.rank_blocks, units, plan.folded_size)
        programs = max(column_units * by_column, row_units * by_row) * plan.rank_blocks * len(plan.scales)
        launch(
            weight_grad_kernel,
            (programs, by_column + by_row),
            grad,
            A,
            B,
            folded,
            partial_a,
            partial_b,
            partial_folded,
            groups,
            in_features,
            out_features,
            plan.rank,
            *grad.stride(),
            *A.stride(),
            *B.stride(),
            config=config,
            SCALES=plan.scales,
            SLOTS=plan.slots,
            RANKS=plan.ranks,
            OFFSETS=plan.offsets,
            FOLDED=plan.folded_size,
            RANK_BLOCK=plan.rank_block,
            BY_COLUMN=by_column,
            BY_ROW=by_row,
            SPAN=WEIGHT_SPAN,
            PRECISION=dot_precision(grad.dtype),
        )
        return partial_a, partial_b, partial_folded

    def key() -> tuple:
        return "weight_grad", tuple(grad.shape), plan, grad.dtype, tuple(needs), layout(grad[0]) if groups else None

    return start(choose(key, weight_grad_candidates(plan, grad.dtype.itemsize), grad.device, start))


@on_its_device
def pyramid_weight_backward(
    grad: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of A, B and folded, each in its dtype and only where ``needs`` asks: two launches.

    Args:
        grad: ``[G, out, in]``, any strides, like those of A, B and folded.
    """
    if not any(needs):
        return None, None, None
    plan, folded = plan_for(A.shape[0], tuple(scales)), folded.contiguous()
    partial_a, partial_b, partial_folded = _partials(grad, A, B, folded, plan, needs)
    grad_A, grad_B, grad_folded = (
        torch.empty_like(tensor) if need else None for tensor, need in zip((A, B, folded), needs, strict=True)
    )
    reduce_gradients(
        plan,
        partial_a=partial_a,
        grad_a=grad_A,
        partial_b=partial_b,
        grad_b=None if grad_B is None else grad_B.T,
        partial_folded=partial_folded,
        grad_folded=grad_folded,
        units_per_segment=1 if partial_folded is None else partial_folded.shape[1] // max(len(folded), 1),
    )
    return grad_A, grad_B, grad_folded
