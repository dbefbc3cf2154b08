"""Structured PyTorch backend: plain matrix products on ``[T, r * sum(k)]`` intermediates, on any device and dtype.

    U = x Ahat^T      Ahat[(p, q), c] = A[p, c // k] * (c % k == q)      shrink, all scales in one read of x
    V = U Kbar^T      per scale and group, k x k                         core
    y = V Bhat        Bhat[(p, a), c] = B[c // k, p] * (c % k == a)      expand, all scales in one product

In half precision the core and the gradients of A, B and the kernels are fp32: what is summed over rows is not rounded
first. Nothing here depends on values: no host synchronisation, and an update ``[out, in]`` exists only in
``pyramid_weight``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

name = "torch"


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
    try:
        rows = folded.narrow(0, 0, 1) if groups is None else folded.index_select(0, groups)
    except IndexError:  # on a CPU; a GPU has an assertion of its own
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


def _joined(parts: Sequence[Tensor], rows: int, scales: Sequence[int], rank: int) -> Tensor:
    return torch.cat([part.reshape(rows, rank * k) for part, k in zip(parts, scales, strict=True)], dim=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _shrink_core(
    x: Tensor, A: Tensor, folded: Tensor, groups: Tensor | None, scales: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``Ahat``, the intermediates ``U`` and ``V`` of all scales, these two ``[T, r * sum(k)]`` in at least fp32."""
    A_hat = _interleave(A, x.shape[1], scales, x.dtype)
    U = _wide(x @ A_hat.T)
    cores = _kernels(folded, groups, scales, U.dtype)
    V = [u @ core.mT for u, core in zip(_by_scale(U, _segments(groups, len(x)), scales), cores, strict=True)]
    return A_hat, U, _joined(V, len(x), scales, A.shape[0])


def pyramid_delta(
    x: Tensor, A: Tensor, B: Tensor, folded: Tensor, groups: Tensor | None, out_features: int, scales: Sequence[int]
) -> Tensor:
    _, _, V = _shrink_core(x, A, folded, groups, scales)
    return V.to(x.dtype) @ _interleave(B.T, out_features, scales, x.dtype)


def pyramid_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
) -> Tensor:
    _, _, V = _shrink_core(x, A, folded, groups, scales)
    return F.linear(x, weight, bias).addmm_(V.to(x.dtype), _interleave(B.T, weight.shape[0], scales, x.dtype))


def pyramid_delta_backward(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A, B, folded, each only where ``needs`` asks. U is recomputed: x is all that forward saves."""
    need_x, need_A, need_B, need_folded = needs
    rank, segments = A.shape[0], _segments(groups, len(x))
    B_hat = _interleave(B.T, grad.shape[1], scales, grad.dtype)
    dV = _wide(grad @ B_hat.T)
    grad_x = grad_A = grad_B = grad_folded = None
    if need_B or need_folded:
        A_hat, U, V = _shrink_core(x, A, folded, groups, scales)
    else:
        A_hat = _interleave(A, x.shape[1], scales, x.dtype)
    if need_B:
        grad_B = _deinterleave(V.T @ _wide(grad), B.shape[0], scales).T.to(B.dtype)
    if need_folded:
        parts = zip(_by_scale(dV, segments, scales), _by_scale(U, segments, scales), strict=True)
        by_segment = torch.cat([(dv.mT @ u).flatten(1) for dv, u in parts], dim=1).to(folded.dtype)
        grad_folded = _sum_by_group(by_segment, groups, folded.shape[0])
    if need_x or need_A:
        cores = _kernels(folded, groups, scales, dV.dtype)
        by_scale = [dv @ core for dv, core in zip(_by_scale(dV, segments, scales), cores, strict=True)]
        dU = _joined(by_scale, len(x), scales, rank)
        if need_x:
            grad_x = dU.to(x.dtype) @ A_hat
        if need_A:
            grad_A = _deinterleave(dU.T @ _wide(x), A.shape[1], scales).to(A.dtype)
    return grad_x, grad_A, grad_B, grad_folded


def _sum_by_group(by_segment: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """``[N, P]`` -> ``[G, P]``. A product with the indicator matrix: ``index_add_`` is not deterministic on a GPU."""
    if groups is None:
        return F.pad(by_segment, (0, 0, 0, num_groups - 1))
    indicator = groups[None] == torch.arange(num_groups, device=groups.device)[:, None]
    return indicator.to(by_segment.dtype) @ by_segment


def pyramid_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    grad_x, grad_A, grad_B, grad_folded = pyramid_delta_backward(grad, x, A, B, folded, groups, scales, needs)
    if grad_x is not None:
        grad_x.addmm_(grad, weight)
    return grad_x, grad_A, grad_B, grad_folded


def _left_factor(B: Tensor, folded: Tensor, out_features: int, scales: Sequence[int]) -> Tensor:
    """``L[g, i*k + a, (p, q)] = B[i, p] Kbar[g, a, q]``; the update is ``L @ Ahat``. -> ``[G, out, r * sum(k)]``."""
    blocks = []
    for kernel, k in zip(folded.to(B.dtype).split([k * k for k in scales], dim=1), scales, strict=True):
        height = -(-out_features // k)
        block = torch.einsum("ip,gaq->giapq", B[:height], kernel.view(-1, k, k))
        blocks.append(block.reshape(len(folded), height * k, B.shape[1] * k)[:, :out_features])
    return torch.cat(blocks, dim=2)


def pyramid_weight(
    A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]
) -> Tensor:
    return _left_factor(B, folded, out_features, scales) @ _interleave(A, in_features, scales, A.dtype)


def pyramid_weight_backward(
    grad: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_A, need_B, need_folded = needs
    _, out_features, in_features = grad.shape
    rank = A.shape[0]
    grad_A = grad_B = grad_folded = None
    if need_A:
        left = _left_factor(B, folded, out_features, scales)
        grad_A = _deinterleave(torch.einsum("gop,goi->pi", left, grad), A.shape[1], scales).to(A.dtype)
    if need_B or need_folded:
        grad_left = grad @ _interleave(A, in_features, scales, A.dtype).T  # [G, out, r * sum(k)]
        grad_B, blocks = torch.zeros_like(B), []
        columns = grad_left.split([rank * k for k in scales], dim=2)
        kernels = folded.to(B.dtype).split([k * k for k in scales], dim=1)
        for part, kernel, k in zip(columns, kernels, scales, strict=True):
            height = -(-out_features // k)
            part = F.pad(part, (0, 0, 0, height * k - out_features)).reshape(-1, height, k, rank, k)
            grad_B[:height] += torch.einsum("giapq,gaq->ip", part, kernel.view(-1, k, k))
            blocks.append(torch.einsum("giapq,ip->gaq", part, B[:height]).flatten(1))
        grad_folded = torch.cat(blocks, dim=1).to(folded.dtype)
    return grad_A, grad_B if need_B else None, grad_folded if need_folded else None
