"""Dense updates, one tile of one group a program, alone or added to a base weight: one launch for all groups.

W[g, o, i] = W0[o, i] + sum_k Z_k[o, i] Kbar_k[g][o % k, i % k]      Z_k[o, i] = sum_p B[o // k, p] A[p, i // k]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import weight_candidates
from .launch import FROM_BATCH, Config, launch
from .plan import plan_for
from .precision import dot_precision
from .target import on_its_device
from .tiles import is_active
from .tune import choose, layout


@triton.jit(do_not_specialize=FROM_BATCH)
def weight_kernel(
    a_ptr,  # [rank, ceil(in / k_min)]
    b_ptr,  # [ceil(out / k_min), rank]
    folded_ptr,  # [G, FOLDED]
    base_ptr,  # [out, in] by strides, or None
    out_ptr,  # [G, out, in], contiguous
    num_groups,
    in_features,
    out_features,
    rank,
    a_stride_p,
    a_stride_j,
    b_stride_j,
    b_stride_p,
    base_stride_out,
    base_stride_in,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Groups run fastest: those of one tile read the same piece of the base weight, A and B while it is in L2.
    program = tl.program_id(0)
    group, tile = program % num_groups, program // num_groups
    tiles_across = tl.cdiv(in_features, BLOCK_I)
    o = (tile // tiles_across) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tile % tiles_across) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_exists, i_exists = o < out_features, i < in_features
    inside = o_exists[:, None] & i_exists[None, :]
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for s in tl.static_range(len(SCALES)):
        kernel_ptr = folded_ptr + group.to(tl.int64) * FOLDED + OFFSETS[s]
        if is_active(kernel_ptr, SCALES[s], SLOTS[s]):
            seed = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            left_lines = b_ptr + (o // SCALES[s])[:, None].to(tl.int64) * b_stride_j
            right_lines = a_ptr + (i // SCALES[s])[None, :].to(tl.int64) * a_stride_j
            for p0 in range(0, rank, BLOCK_P):
                p_exists = p0 + p < rank
                left = tl.load(
                    left_lines + (p0 + p)[None, :].to(tl.int64) * b_stride_p,
                    mask=o_exists[:, None] & p_exists[None, :],
                    other=0.0,
                )
                right = tl.load(
                    right_lines + (p0 + p)[:, None].to(tl.int64) * a_stride_p,
                    mask=p_exists[:, None] & i_exists[None, :],
                    other=0.0,
                )
                seed = tl.dot(left, right, seed, input_precision=PRECISION)
            # Every address is one of the k * k of the kernel, so no mask is needed for tiles that overhang.
            total += seed * tl.load(kernel_ptr + (o % SCALES[s])[:, None] * SCALES[s] + (i % SCALES[s])[None, :]).to(
                tl.float32
            )
    if base_ptr is not None:
        base = tl.load(
            base_ptr + o[:, None].to(tl.int64) * base_stride_out + i[None, :].to(tl.int64) * base_stride_in,
            mask=inside,
            other=0.0,
        )
        total = base.to(tl.float32) + total
    lines = out_ptr + (group.to(tl.int64) * out_features + o[:, None]) * in_features
    tl.store(lines + i[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def _weights(
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    scales: Sequence[int],
    base: Tensor | None,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
) -> Tensor:
    groups, out_features, in_features = sizes
    plan, folded = plan_for(A.shape[0], tuple(scales)), folded.contiguous()

    def start(config: Config) -> Tensor:
        output = torch.empty(sizes, dtype=dtype, device=A.device)
        tiles = triton.cdiv(out_features, config["BLOCK_O"]) * triton.cdiv(in_features, config["BLOCK_I"])
        launch(
            weight_kernel,
            (tiles * groups,),
            A,
            B,
            folded,
            base,
            output,
            groups,
            in_features,
            out_features,
            plan.rank,
            *A.stride(),
            *B.stride(),
            *((0, 0) if base is None else base.stride()),
            config=config,
            SCALES=plan.scales,
            SLOTS=plan.slots,
            OFFSETS=plan.offsets,
            FOLDED=plan.folded_size,
            PRECISION=dot_precision(A.dtype),
        )
        return output

    def key() -> tuple:
        return "weight", sizes, plan, A.dtype, dtype, None if base is None else layout(base)

    return start(choose(key, weight_candidates(plan, A.dtype.itemsize), A.device, start))


@on_its_device
def pyramid_weight(
    A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]
) -> Tensor:
    """Dense update of every group, ``[G, out, in]`` in the dtype of A; A, B and folded by any strides."""
    return _weights(A, B, folded, scales, None, (len(folded), out_features, in_features), A.dtype)


@on_its_device
def merge(weight: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int]) -> Tensor:
    """``weight [out, in]`` plus each group's update, ``[G, out, in]``: summed in fp32, rounded once to its dtype."""
    return _weights(A, B, folded, scales, weight, (len(folded), *weight.shape), weight.dtype)
