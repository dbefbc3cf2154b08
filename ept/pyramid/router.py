"""The router: which experts a task, or a token, uses in a layer, and with what weights (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ept_kernels import PyramidGeometry, active_scales, fold_kernels, fold_tasks, without_autocast


def route(gate: Tensor, embeddings: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Top-k of the tasks' logits ``embeddings @ gate.T`` and the softmax over the selected ones; never below fp32.

    With ``top_k = 1`` the softmax of one logit is the constant 1: the value stays 1 and the gradient is that of the
    full softmax (straight-through), so that the gate learns.

    Args:
        gate: ``[E, d]``.
        embeddings: ``[G, d]``, of tasks.
        top_k: experts to select, 1 to E.

    Returns:
        ``(index [G, top_k] int64, gates [G, top_k])``, best expert first; gates sum to 1.
    """
    dtype = torch.promote_types(gate.dtype, torch.float32)
    # Row by row: the rounding of a matrix product depends on the number of tasks.
    return _select((embeddings.to(dtype)[:, None] * gate.to(dtype)).sum(-1), top_k)


def route_rows(gate: Tensor, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``route`` of tokens by their own inputs, ``rows [T, in]``, for a gate ``[E, in]``."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    with without_autocast(gate.device):
        logits = rows.to(dtype) @ gate.to(dtype).T
    return _select(logits, top_k)


def _select(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
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


UNMERGEABLE = (
    "EPT with routing='token' chooses experts for every token, so no one weight does what it does: it can be neither "
    "merged nor exported; unload() gives the base model back"
)

#: Up to so many rows, one native call (on one thread) routes and folds faster than a dozen tensor operations.
FUSED_ROWS = 512


def rows_of(x: Tensor, in_features: int) -> Tensor:
    """x ``[..., in]`` as ``[T, in]``.

    Raises:
        ValueError: x of another width, or not a floating-point tensor.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., in_features={in_features}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
    return x.reshape(-1, in_features)


def fold_tokens(
    x: Tensor, gate: Tensor, kernels: Sequence[Tensor], top_k: int, scaling: float, geometry: PyramidGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Folded kernels of every row, one group a row: ``(folded [T, folded_size], groups [T], active [T, S])``.

    With the default pyramid that is 120 numbers a row, in the dtype of the gate, where task routing has 120 a task.

    Args:
        x: ``[..., in]``, any floating dtype: what the layer is given, before dropout.
        gate: ``[E, in]``. kernels, scaling, geometry: as ``fold_kernels``. top_k: experts a row selects, 1 to E.

    Returns:
        As the ops take them; ``folded`` is differentiable in x, gate and kernels.

    Raises:
        ValueError: x of another width, or not a floating-point tensor.
    """
    rows = rows_of(x, geometry.in_features)
    groups = torch.arange(rows.shape[0], device=x.device)
    if not torch.compiler.is_compiling() and gate.is_cpu and 0 < rows.shape[0] <= FUSED_ROWS:
        # The rows take the place of the table of tasks.
        fused = fold_tasks(gate, rows, None, kernels, top_k, scaling, geometry)
        if fused is not None:
            return fused[0], groups, fused[1]
    folded, active = fold_routed(kernels, *route_rows(gate, rows, top_k), scaling, geometry)
    return folded, groups, active
