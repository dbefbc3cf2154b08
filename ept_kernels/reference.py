"""The definition of EPT in plain PyTorch, materialised and slow on purpose: the oracle of every test.

Each function is differentiable by ordinary autograd and works in float64. Nothing here is tuned; read it beside the
paper (arXiv 2603.12577): seed, Adaptive LoRA Pruner, deconvolution, gated sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import PyramidGeometry


def deconvolve(seed: Tensor, kernel: Tensor) -> Tensor:
    """Transposed convolution with stride = kernel size. seed ``[h, w]``, kernel ``[k, k]`` -> ``[h * k, w * k]``."""
    return F.conv_transpose2d(seed[None, None], kernel[None, None], stride=kernel.shape[0])[0, 0]


def scale_weight(A: Tensor, B: Tensor, kernel: Tensor, geometry: PyramidGeometry) -> Tensor:
    """One kernel's weight: prune the seed, deconvolve, crop. A ``[r, w]``, B ``[h, r]`` -> ``[out, in]``."""
    scale = geometry.scales.index(kernel.shape[0])
    pruned_A, pruned_B = A[:, : geometry.widths[scale]], B[: geometry.heights[scale]]
    return deconvolve(pruned_B @ pruned_A, kernel)[: geometry.out_features, : geometry.in_features]


def layer_update(
    A: Tensor, B: Tensor, kernels: Sequence[Tensor], gates: Tensor, scaling: float, geometry: PyramidGeometry
) -> Tensor:
    """``scaling * sum_e gates[g, e] * s_{k_e} * W_e`` for every group, expert by expert.

    gates ``[G, E]`` holds 0 for an expert that the router did not select -> ``[G, out, in]``.
    """
    weights = [
        geometry.alp_factors[scale] * scale_weight(A, B, kernel, geometry)
        for scale, kernel in zip(geometry.expert_scale, kernels, strict=True)
    ]
    return scaling * torch.einsum("ge,eoi->goi", gates.to(A.dtype), torch.stack(weights))


def fold_kernels(kernels: Sequence[Tensor], gates: Tensor, scaling: float, geometry: PyramidGeometry) -> Tensor:
    """``Kbar_k = scaling * s_k * sum_{e: k_e = k} gates[:, e] * K_e``. gates ``[G, E]`` -> ``[G, folded_size]``."""
    folded = []
    for scale, k in enumerate(geometry.scales):
        block = torch.zeros(gates.shape[0], k, k, dtype=gates.dtype, device=gates.device)
        for expert, kernel in enumerate(kernels):
            if geometry.kernel_sizes[expert] == k:
                block = block + gates[:, expert, None, None] * kernel.to(gates.dtype)
        folded.append((scaling * geometry.alp_factors[scale] * block).flatten(1))
    return torch.cat(folded, dim=1)


def unpack_folded(folded: Tensor, geometry: PyramidGeometry) -> list[Tensor]:
    """``[G, folded_size]`` -> one ``[G, k, k]`` for every scale."""
    return [
        folded[:, start : start + k * k].reshape(-1, k, k)
        for start, k in zip(geometry.offsets, geometry.scales, strict=True)
    ]


def pyramid_weight(A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> Tensor:
    """Dense update of every group, ``[G, out, in]``: sum over scales of the deconvolution of the pruned seed."""
    updates = []
    for group in range(folded.shape[0]):
        kernels = unpack_folded(folded[group : group + 1], geometry)
        parts = [scale_weight(A, B, kernel[0].to(A.dtype), geometry) for kernel in kernels]
        updates.append(sum(parts[1:], parts[0]))
    if not updates:
        return A.new_zeros(0, geometry.out_features, geometry.in_features)
    return torch.stack(updates)


def row_groups(rows: int, groups: Tensor | None, device: torch.device) -> Tensor:
    """The group of each row, ``[rows]``, from a table ``[N]`` of one entry per ``rows / N`` rows (None: all 0)."""
    if groups is None:
        return torch.zeros(rows, dtype=torch.long, device=device)
    repeats = rows // groups.shape[0] if groups.shape[0] else 0
    return groups.repeat_interleave(repeats)


def pyramid_delta(
    x: Tensor, A: Tensor, B: Tensor, folded: Tensor, groups: Tensor | None, geometry: PyramidGeometry
) -> Tensor:
    """The adapter's output, row by row through its group's dense update. x ``[..., in]`` -> ``[..., out]``."""
    rows = x.reshape(-1, geometry.in_features)
    weight = pyramid_weight(A, B, folded, geometry).to(x.dtype)
    delta = torch.einsum("ti,toi->to", rows, weight[row_groups(rows.shape[0], groups, x.device)])
    return delta.reshape(*x.shape[:-1], geometry.out_features)


def pyramid_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    geometry: PyramidGeometry,
) -> Tensor:
    """Frozen linear plus adapter. x ``[..., in]``, weight ``[out, in]``, bias ``[out]`` -> ``[..., out]``."""
    return F.linear(x, weight, bias) + pyramid_delta(x, A, B, folded, groups, geometry)
