"""CUDA C++ kernels for what torch's library has no single call for; ``gpu.py`` makes the ops of them.

Interleaved factors, the k x k core and its adjoint, the gradients' gather, dropout that replays, router and fold. With
W = r * sum(k), columns of intermediates run scale after scale, in each rank after rank, in each slot after slot. Sums
are fp32 whatever the rows are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cuda_fold as folder
from .cuda_library import DTYPES, INLINE_SCALES, Pyramid, address, build_info, launch, unsupported
from .gpu import Library

__all__ = [
    "backward",
    "build_info",
    "core",
    "core_backward",
    "delta_weight",
    "delta_weight_backward",
    "dropout",
    "folder",
    "forward",
    "fuses_dropout",
    "gather",
    "interleave",
    "keeps",
    "name",
    "unsupported",
]

name = "cuda"
fuses_dropout = True
keeps = True


@functools.lru_cache(maxsize=1024)
def _cached_pyramid(
    rank: int, scales: tuple[int, ...], device: torch.device | None
) -> tuple[int, bytes, Tensor | None]:
    table = None if device is None else torch.tensor(scales, dtype=torch.int32, device=device)
    columns, inline = rank * sum(scales), scales if table is None else ()
    params = Pyramid(address(table), columns, sum(k * k for k in scales), rank, len(scales), inline)
    return columns, bytes(params), table


def _pyramid(rank: int, scales: Sequence[int], like: Tensor) -> tuple[int, bytes, Tensor | None]:
    """W, the struct, and the table that the struct points to if it does not hold the scales itself."""
    scales = tuple(scales)
    return _cached_pyramid(rank, scales, None if len(scales) <= INLINE_SCALES else like.device)


def interleave(
    A: Tensor, B: Tensor, in_features: int, out_features: int, scales: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``A_hat [W, in]``, ``A_hat[(s, p, q), c] = A[p, c // k] * (c % k == q)``; ``B_hat [W, out]`` from B transposed.

    Args:
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``, one dtype, any strides.
    """
    if A.dtype not in DTYPES:
        A, B = A.float(), B.float()
    columns, pyramid, _ = _pyramid(A.shape[0], scales, A)
    A_hat = torch.empty((columns, in_features), dtype=dtype, device=A.device)
    B_hat = torch.empty((columns, out_features), dtype=dtype, device=A.device)
    launch(
        "ept_interleave",
        A,
        pyramid,
        A.data_ptr(),
        *A.stride(),
        B.data_ptr(),
        B.stride(1),
        B.stride(0),
        A_hat.data_ptr(),
        B_hat.data_ptr(),
        in_features,
        out_features,
        DTYPES[A.dtype],
        DTYPES[dtype],
    )
    return A_hat, B_hat


def gather(
    grad_A_hat: Tensor | None,
    grad_B_hat: Tensor | None,
    rank: int,
    seed_width: int,
    seed_height: int,
    scales: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    """The adjoint of ``interleave``: ``grad_A [r, seed_width]``, ``grad_B [seed_height, r]``, fp32; None for None."""
    like = grad_B_hat if grad_A_hat is None else grad_A_hat
    if like is None:
        return None, None
    grad_A = grad_B = None
    in_features = out_features = a_dtype = b_dtype = 0
    if grad_A_hat is not None:
        grad_A_hat = grad_A_hat.contiguous()
        grad_A = torch.empty(rank, seed_width, dtype=torch.float32, device=like.device)
        in_features, a_dtype = grad_A_hat.shape[1], DTYPES[grad_A_hat.dtype]
    if grad_B_hat is not None:
        grad_B_hat = grad_B_hat.contiguous()
        grad_B = torch.empty(seed_height, rank, dtype=torch.float32, device=like.device)
        out_features, b_dtype = grad_B_hat.shape[1], DTYPES[grad_B_hat.dtype]
    launch(
        "ept_gather",
        like,
        _pyramid(rank, scales, like)[1],
        address(grad_A_hat),
        address(grad_B_hat),
        address(grad_A),
        address(grad_B),
        in_features,
        out_features,
        seed_width,
        seed_height,
        a_dtype,
        b_dtype,
    )
    return grad_A, grad_B


def _spans(rows: int, groups: int) -> tuple[int, int]:
    """How many spans of rows, and rows in each, are summed apart: enough to fill a GPU, few where groups do that."""
    spans = max(1, min(-(-rows // 32), 256, 4096 // max(groups, 1)))
    length = -(-rows // spans)
    return -(-rows // max(length, 1)) or 1, length


def core_backward(
    U: Tensor | None,
    dV: Tensor | None,
    folded: Tensor,
    groups: Tensor | None,
    active: Tensor | None,
    scales: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``V [T, W]`` again, its adjoint ``dU [T, W]`` and ``grad_folded [G, F]`` fp32, each where ``needs`` asks.

    U may be None where dU alone is wanted, dV where V alone is. The gradient sums in a fixed order; rows of a group
    that ``folded`` lacks add to none of it.
    """
    need_V, need_dU, need_folded = needs
    if U is not None:
        U = U.contiguous()
    if dV is not None:
        dV = dV.contiguous()
    like = dV if U is None else U
    assert like is not None
    if dV is not None and dV.dtype != like.dtype:
        raise ValueError(f"dV must have the dtype of U, {like.dtype}, got {dV.dtype}")
    rows, columns = like.shape
    _, pyramid, _ = _pyramid(columns // sum(scales), scales, like)
    folded = folded.contiguous()
    count = folded.shape[0]
    V = torch.empty_like(like) if need_V else None
    dU = torch.empty_like(like) if need_dU else None
    rows_per_id, wide = 1, False
    if groups is not None:
        groups = groups.contiguous()
        rows_per_id, wide = rows // max(groups.shape[0], 1), groups.dtype == torch.int64
    if active is not None:
        active = active.contiguous()
    grad_folded = partial = None
    spans = length = 1
    if need_folded:
        grad_folded = torch.empty_like(folded)
        spans, length = _spans(rows, count)
        if spans > 1:
            partial = folded.new_empty(spans, *folded.shape)
    launch(
        "ept_core",
        like,
        pyramid,
        address(groups),
        rows_per_id,
        count,
        folded.data_ptr(),
        address(active),
        rows,
        address(U),
        address(V),
        address(dV),
        address(dU),
        address(grad_folded),
        address(partial),
        spans,
        length,
        wide,
        DTYPES[like.dtype],
    )
    return V, dU, grad_folded


def core(U: Tensor, folded: Tensor, groups: Tensor | None, active: Tensor | None, scales: Sequence[int]) -> Tensor:
    """``V[t, (s, p, a)] = sum_q Kbar_s[g(t)][a, q] U[t, (s, p, q)]``, ``[T, W]`` in the dtype of U.

    Zero where ``active`` says that a group does not use a scale: U is not read there. NaN in a row of a group that
    ``folded`` lacks.

    Args:
        U: ``[T, W]``. folded: ``[G, F]`` fp32. groups: ``[N]`` int64 or int32, each for T / N rows; None: group 0.
        active: ``[G, S]`` bool, or None.
    """
    V, _, _ = core_backward(U, None, folded, groups, active, scales, (True, False, False))
    assert V is not None
    return V


def dropout(x: Tensor, seed: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """x ``[T, n]`` with entries zeroed with probability ``p``, the others divided by 1 - p; added to ``onto`` in place.

    The mask depends on ``seed [1]`` (int64, on the device) and an entry's row and column alone: later calls replay it.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    if onto is not None and onto.stride(1) != 1:
        return onto.add_(dropout(x, seed, p))
    rows, columns = x.shape
    out = x.new_empty(rows, columns) if onto is None else onto
    launch(
        "ept_dropout",
        x,
        x.data_ptr(),
        out.data_ptr(),
        seed.data_ptr(),
        rows,
        x.stride(0),
        out.stride(0),
        columns,
        min(int(p * 2**32), 2**32 - 1),
        1 / (1 - p),
        onto is not None,
        DTYPES[x.dtype],
    )
    return out


_ops = Library(sys.modules[__name__])
forward, backward = _ops.forward, _ops.backward
delta_weight, delta_weight_backward = _ops.delta_weight, _ops.delta_weight_backward
