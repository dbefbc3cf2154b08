"""Fold experts of the same scale into one kernel per scale, before any large tensor is touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import PyramidGeometry

#: Up to so many groups, which are tasks, a group's result does not depend, to the bit, on how many there are: a task's
#: output stays the same when others are added. A matrix product rounds in an order that hangs on its number of rows; it
#: is left to larger numbers of groups, which are tokens.
MOST_TASKS = 1024


def _by_scale(geometry: PyramidGeometry) -> list[int]:
    """The experts, those of the smallest scale first."""
    return sorted(range(geometry.num_experts), key=geometry.kernel_sizes.__getitem__)


def _split(gates: Tensor, geometry: PyramidGeometry) -> Sequence[Tensor]:
    """The columns of ``gates [G, E]``, scale by scale."""
    by_scale = _by_scale(geometry)
    if by_scale != list(range(len(by_scale))):
        columns = gates.unbind(1)
        gates = torch.stack([columns[expert] for expert in by_scale], dim=1)
    return gates.split(geometry.experts_per_scale, 1)


def fold_kernels(kernels: Sequence[Tensor], gates: Tensor, scaling: float, geometry: PyramidGeometry) -> Tensor:
    """``Kbar_k[g] = scaling * s_k * sum_{e: k_e = k} gates[g, e] K_e``, packed scale after scale (spec identity 2).

    Args:
        kernels: one ``[k_e, k_e]`` per expert, in the order of ``geometry.kernel_sizes``.
        gates: ``[G, E]``, 0 where the router did not select the expert; fp32 or fp64.
        scaling: ``alpha / r``.
        geometry: the layer's sizes.

    Returns:
        ``[G, folded_size]`` in the dtype of ``gates``; differentiable in ``kernels`` and ``gates``.

    Raises:
        ValueError: the number or a shape of the kernels, or the width of ``gates``, does not fit the geometry.
    """
    sizes = geometry.kernel_sizes
    kernels = tuple(kernels)  # a ParameterList looks each item up by name, every time
    found = tuple(kernel.shape[0] for kernel in kernels)
    if found != sizes:
        raise ValueError(f"kernels must have the sizes {sizes}, got {found}")
    shapes = [list(kernel.shape) for kernel in kernels]
    if shapes != [[k, k] for k in sizes]:
        raise ValueError(f"kernels must be square, one [k, k] per expert, got the shapes {shapes}")
    if gates.dim() != 2 or gates.shape[1] != geometry.num_experts:
        raise ValueError(f"gates must be [groups, {geometry.num_experts} experts], got {list(gates.shape)}")
    counts = geometry.experts_per_scale
    entries = torch.cat([kernels[expert].reshape(-1) for expert in _by_scale(geometry)]).to(gates.dtype)
    tables = entries.split([count * k * k for count, k in zip(counts, geometry.scales, strict=True)])
    blocks = []
    for gate, table, count, alp in zip(_split(gates, geometry), tables, counts, geometry.alp_factors, strict=True):
        gate, table = gate * (scaling * alp), table.view(count, -1)
        blocks.append((gate[:, :, None] * table).sum(1) if len(gate) <= MOST_TASKS else gate @ table)
    return torch.cat(blocks, dim=1)


def active_scales(gates: Tensor, geometry: PyramidGeometry) -> Tensor:
    """``[G, S]`` bool: whether a group's gates ``[G, E]`` select an expert of each of ``geometry.scales``.

    The kernel that ``fold_kernels`` makes for a scale without one is zero and gets no gradient: the ops skip it.
    """
    return torch.stack([own.any(1) for own in _split(gates != 0, geometry)], dim=1)


def mask_inactive(grad_folded: Tensor, active: Tensor, scales: Sequence[int]) -> Tensor:
    """The gradient of folded kernels ``[G, folded_size]`` with zeros for scales that are not ``active [G, S]``."""
    mask = torch.cat([active[:, s, None].expand(-1, k * k) for s, k in enumerate(scales)], dim=1)
    return grad_folded.masked_fill(~mask, 0)
