"""Plain PyTorch, on any device and dtype: the small kernels of ``gpu`` without a compiler, and the dense update.

In half precision the core and the gradients of A, B and the kernels are fp32: what is summed over rows is not rounded
first. Nothing here depends on values: no host synchronisation, and an update ``[out, in]`` exists only in
``pyramid_weight``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..folding import mask_inactive
from .gpu import Library

name = "torch"
fuses_dropout = False
keeps = True
folder = None


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _interleave(factor: Tensor, features: int, scales: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Stack ``kron(factor[:, :ceil(features / k)], I_k)`` over the scales: ``[r, w]`` -> ``[r * sum(k), features]``."""
    rank = factor.shape[0]
    blocks = []
    for k in scales:
        width = -(-features // k)
        block = factor.new_zeros(rank, k, width, k, dtype=dtype)
        block.diagonal(dim1=1, dim2=3).copy_(factor[:, :width, None].expand(-1, -1, k))
        blocks.append(block.view(rank * k, width * k)[:, :features])
    return torch.cat(blocks)


def _deinterleave(grad: Tensor, width: int, scales: Sequence[int]) -> Tensor:
    """Adjoint of ``_interleave``: grad ``[r * sum(k), features]`` -> ``[r, width]`` in at least fp32."""
    features, rank = grad.shape[1], grad.shape[0] // sum(scales)
    total = grad.new_zeros(rank, width, dtype=torch.promote_types(grad.dtype, torch.float32))
    start = 0
    for k in scales:
        used = -(-features // k)
        block = F.pad(grad[start : start + rank * k], (0, used * k - features)).view(rank, k, used, k)
        total[:, :used] += block.diagonal(dim1=1, dim2=3).sum(-1, dtype=total.dtype)
        start += rank * k
    return total


def _segments(groups: Tensor | None, rows: int) -> tuple[int, int]:
    """Number of segments and rows in each; a segment is a run of consecutive rows that share a folded kernel."""
    if groups is None:
        return 1, rows
    return groups.shape[0], rows // max(groups.shape[0], 1)


def _kernels(folded: Tensor, groups: Tensor | None, scales: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Each scale's kernels by segment, ``[N, k, k]``."""
    if groups is None:
        rows = folded.narrow(0, 0, 1)
    elif folded.is_cuda:  # an assertion on the device would end the process's use of it
        exists = (groups >= 0) & (groups < len(folded))
        rows = folded.index_select(0, groups.clamp(0, len(folded) - 1)).masked_fill(~exists[:, None], float("nan"))
    else:
        try:
            rows = folded.index_select(0, groups)
        except IndexError:
            raise IndexError(f"groups holds an id out of range; allowed: 0 to {len(folded) - 1}") from None
    blocks = rows.to(dtype).split([k * k for k in scales], dim=1)
    return [block.reshape(-1, k, k) for block, k in zip(blocks, scales, strict=True)]


def _by_scale(rows: Tensor, segments: tuple[int, int], scales: Sequence[int]) -> list[Tensor]:
    """Split ``[T, r * sum(k)]`` into one ``[N, T/N * r, k]`` for each scale."""
    count, length = segments
    rank = rows.shape[1] // sum(scales)
    return [
        part.reshape(count, length * rank, k)
        for part, k in zip(rows.split([rank * k for k in scales], dim=1), scales, strict=True)
    ]


def _joined(parts: Sequence[Tensor], like: Tensor, scales: Sequence[int]) -> Tensor:
    """``_by_scale`` undone, in the dtype of ``like [T, r * sum(k)]``."""
    rank = like.shape[1] // sum(scales)
    columns = [part.reshape(len(like), rank * k) for part, k in zip(parts, scales, strict=True)]
    return torch.cat(columns, dim=1).to(like.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def interleave(
    A: Tensor, B: Tensor, in_features: int, out_features: int, scales: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _interleave(A, in_features, scales, dtype), _interleave(B.T, out_features, scales, dtype)


def core(U: Tensor, folded: Tensor, groups: Tensor | None, active: Tensor | None, scales: Sequence[int]) -> Tensor:
    """An inactive kernel is zero, so its V is."""
    segments, wide = _segments(groups, len(U)), _wide(U)
    kernels = _kernels(folded, groups, scales, wide.dtype)
    V = [u @ kernel.mT for u, kernel in zip(_by_scale(wide, segments, scales), kernels, strict=True)]
    return _joined(V, U, scales)


def core_backward(
    U: Tensor | None,
    dV: Tensor | None,
    folded: Tensor,
    groups: Tensor | None,
    active: Tensor | None,
    scales: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_V, need_dU, need_folded = needs
    V = dU = grad_folded = None
    if need_V and U is not None:
        V = core(U, folded, groups, active, scales)
    if dV is None:
        return V, None, None
    segments, wide = _segments(groups, len(dV)), _wide(dV)
    by_scale = _by_scale(wide, segments, scales)
    if need_dU:
        kernels = _kernels(folded, groups, scales, wide.dtype)
        dU = _joined([dv @ kernel for dv, kernel in zip(by_scale, kernels, strict=True)], dV, scales)
    if need_folded and U is not None:
        parts = zip(by_scale, _by_scale(_wide(U), segments, scales), strict=True)
        by_segment = torch.cat([(dv.mT @ u).flatten(1) for dv, u in parts], dim=1)
        grad_folded = _sum_by_group(by_segment, groups, folded.shape[0])
        if active is not None:
            grad_folded = mask_inactive(grad_folded, active, scales)
    return V, dU, grad_folded


def gather(
    grad_A_hat: Tensor | None,
    grad_B_hat: Tensor | None,
    rank: int,
    seed_width: int,
    seed_height: int,
    scales: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    grad_A = None if grad_A_hat is None else _deinterleave(grad_A_hat, seed_width, scales)
    grad_B = None if grad_B_hat is None else _deinterleave(grad_B_hat, seed_height, scales).T
    return grad_A, grad_B


def _sum_by_group(by_segment: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """``[N, P]`` -> ``[G, P]``. A product with the indicator matrix: ``index_add_`` is not deterministic on a GPU."""
    if groups is None:
        return F.pad(by_segment, (0, 0, 0, num_groups - 1))
    indicator = groups[None] == torch.arange(num_groups, device=groups.device)[:, None]
    return indicator.to(by_segment.dtype) @ by_segment


_ops = Library(sys.modules[__name__])
forward, backward = _ops.forward, _ops.backward
delta_weight, delta_weight_backward = _ops.delta_weight, _ops.delta_weight_backward
