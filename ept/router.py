"""The router: which experts a task, or a token, uses in a layer, and with what weights (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ept_kernels import PyramidGeometry, active_scales, fold_kernels, without_autocast


def route(gate: Tensor, embeddings: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Top-k of ``embeddings @ gate.T`` and the softmax over the selected logits; never below fp32.

    With ``top_k = 1`` the softmax of one logit is the constant 1: the value stays 1 and the gradient is that of the
    full softmax (straight-through), so that the gate learns.

    Args:
        gate: ``[E, d]``.
        embeddings: ``[G, d]``, of tasks; or tokens' own inputs ``[T, in]``, for a gate ``[E, in]``.
        top_k: experts to select, 1 to E.

    Returns:
        ``(index [G, top_k] int64, gates [G, top_k])``, best expert first; gates sum to 1.
    """
    dtype = torch.promote_types(gate.dtype, torch.float32)
    with without_autocast(gate.device):
        logits = embeddings.to(dtype) @ gate.to(dtype).T
    selected, index = logits.topk(top_k, dim=-1)
    if top_k == 1:
        probability = logits.softmax(-1).gather(-1, index)
        return index, 1 + (probability - probability.detach())
    return index, selected.softmax(-1)


def route_stages(
    gate: Tensor, embeddings: Tensor, tasks: Tensor, top_k: int, stages: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """``route``, where a task may use the experts of its stage alone: those that came with it or before.

    Args:
        tasks: ids of the embeddings, ``[G]``. stages: ``(first task, number of experts)`` of each, in their order.
    """
    index, gates = route(gate[: stages[0][1]], embeddings, top_k)
    for first, experts in stages[1:]:
        later, found = (tasks >= first)[:, None], route(gate[:experts], embeddings, top_k)
        index, gates = torch.where(later, found[0], index), torch.where(later, found[1], gates)
    return index, gates


def fold_routed(
    kernels: Sequence[Tensor], index: Tensor, gates: Tensor, scaling: float, geometry: PyramidGeometry
) -> tuple[Tensor, Tensor]:
    """Fold the experts that ``route`` selected: ``(folded [G, folded_size], active [G, S])``, as the ops take them.

    Args:
        kernels, scaling, geometry: as ``fold_kernels``. index, gates: ``[G, top_k]``.
    """
    dense = gates.new_zeros(len(gates), geometry.num_experts).scatter(1, index, gates)
    with without_autocast(dense.device):
        folded = fold_kernels(kernels, dense, scaling, geometry)
    return folded, active_scales(dense.detach(), geometry)
