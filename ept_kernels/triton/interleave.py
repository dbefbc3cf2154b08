"""The interleaved factors of all scales, in one launch, and the adjoint in another.

Ahat[(k, p, q), c] = A[p, c // k] (c % k == q)        Bhat[(k, p, a), o] = B[o // k, p] (o % k == a)
dA[p, j] = sum_k sum_{q < k} dAhat[(k, p, q), j k + q]      dB likewise
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, launch

_INTERLEAVE = Config.of(BLOCK=512, SLOTS=8, num_warps=4, num_stages=1)
_GATHER = Config.of(BLOCK=64, num_warps=2, num_stages=1)


@triton.jit
def write_hat(
    factor_ptr,  # [RANK, w] by strides
    hat_ptr,  # [RANK * sum(k), features]
    features,
    stride_p,
    stride_j,
    RANK: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Every row of one rank p, at a block of channels."""
    p = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < features
    for s in tl.static_range(len(SCALES)):
        source = factor_ptr + tl.cast(stride_p, tl.int64) * p + (c // SCALES[s]).to(tl.int64) * stride_j
        entries = tl.load(source, mask=inside, other=0.0)
        for q0 in range(0, SCALES[s], SLOTS):
            q = q0 + tl.arange(0, SLOTS)
            values = tl.where((c % SCALES[s])[None, :] == q[:, None], entries[None, :], 0.0)
            place = hat_ptr + (p * SCALES[s] + q)[:, None].to(tl.int64) * features + c[None, :]
            tl.store(place, values.to(hat_ptr.dtype.element_ty), mask=(q < SCALES[s])[:, None] & inside[None, :])
        hat_ptr += tl.cast(RANK * SCALES[s], tl.int64) * features


@triton.jit
def interleave_kernel(
    a_ptr,  # [RANK, ceil(in / k_min)] by strides
    b_ptr,  # [ceil(out / k_min), RANK] by strides
    a_hat_ptr,  # [W, in]
    b_hat_ptr,  # [W, out]
    in_features,
    out_features,
    a_stride_p,
    a_stride_j,
    b_stride_j,
    b_stride_p,
    RANK: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    if tl.program_id(2) == 0:
        write_hat(a_ptr, a_hat_ptr, in_features, a_stride_p, a_stride_j, RANK, SCALES, BLOCK, SLOTS)
    else:
        write_hat(b_ptr, b_hat_ptr, out_features, b_stride_p, b_stride_j, RANK, SCALES, BLOCK, SLOTS)


def interleave(
    A: Tensor, B: Tensor, in_features: int, out_features: int, scales: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rank, columns = A.shape[0], A.shape[0] * sum(scales)
    A_hat = torch.empty((columns, in_features), dtype=dtype, device=A.device)
    B_hat = torch.empty((columns, out_features), dtype=dtype, device=A.device)
    launch(
        interleave_kernel,
        (-(-max(in_features, out_features) // _INTERLEAVE["BLOCK"]), rank, 2),
        A,
        B,
        A_hat,
        B_hat,
        in_features,
        out_features,
        *A.stride(),
        *B.stride(),
        config=_INTERLEAVE,
        RANK=rank,
        SCALES=tuple(scales),
    )
    return A_hat, B_hat


@triton.jit
def sum_hat(
    hat_ptr,  # [RANK * sum(k), features]
    grad_ptr,  # [RANK, width] by strides
    features,
    width,
    stride_p,
    stride_j,
    RANK: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one rank p of a factor, at a block of j."""
    p = tl.program_id(1)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(len(SCALES)):
        for q in range(SCALES[s]):
            c = j * SCALES[s] + q
            row = hat_ptr + tl.cast(p * SCALES[s] + q, tl.int64) * features
            total += tl.load(row + c, mask=c < features, other=0.0).to(tl.float32)
        hat_ptr += tl.cast(RANK * SCALES[s], tl.int64) * features
    tl.store(grad_ptr + p * stride_p + j * stride_j, total, mask=j < width)


@triton.jit
def gather_kernel(
    a_hat_ptr,  # [W, in], or None
    b_hat_ptr,  # [W, out], or None
    grad_a_ptr,  # [RANK, width]
    grad_b_ptr,  # [height, RANK]
    in_features,
    out_features,
    width,
    height,
    RANK: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if a_hat_ptr is not None:
        if tl.program_id(2) == 0:
            sum_hat(a_hat_ptr, grad_a_ptr, in_features, width, width, 1, RANK, SCALES, BLOCK)
    if b_hat_ptr is not None:
        if tl.program_id(2) == 1:
            sum_hat(b_hat_ptr, grad_b_ptr, out_features, height, 1, RANK, RANK, SCALES, BLOCK)


def gather(
    grad_A_hat: Tensor | None,
    grad_B_hat: Tensor | None,
    rank: int,
    seed_width: int,
    seed_height: int,
    scales: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    grad_A = grad_B = None
    if grad_A_hat is not None:
        grad_A = torch.empty((rank, seed_width), dtype=torch.float32, device=grad_A_hat.device)
    if grad_B_hat is not None:
        grad_B = torch.empty((seed_height, rank), dtype=torch.float32, device=grad_B_hat.device)
    if grad_A is None and grad_B is None:
        return None, None
    launch(
        gather_kernel,
        (-(-max(seed_width, seed_height) // _GATHER["BLOCK"]), rank, 2),
        grad_A_hat,
        grad_B_hat,
        grad_A,
        grad_B,
        0 if grad_A_hat is None else grad_A_hat.shape[1],
        0 if grad_B_hat is None else grad_B_hat.shape[1],
        seed_width,
        seed_height,
        config=_GATHER,
        RANK=rank,
        SCALES=tuple(scales),
    )
    return grad_A, grad_B
