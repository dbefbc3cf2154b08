"""The task-aware router: which experts a task uses in a layer, and with what weights (spec section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ept_kernels import without_autocast


def route(gate: Tensor, embeddings: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Top-k of ``embeddings @ gate.T`` and the softmax over the selected logits; never below fp32.

    With ``top_k = 1`` the softmax of one logit is the constant 1: the value stays 1 and the gradient is that of the
    full softmax (straight-through), so that the gate learns.

    Args:
        gate: ``[E, d]``.
        embeddings: ``[G, d]``.
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
