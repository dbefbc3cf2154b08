"""The contrastive task loss (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import TaskContext
from .tasks import TaskTable


def contrastive_task_loss(
    pooled: Sequence[Tensor], tasks: int | Tensor, table: TaskTable, temperature: float
) -> Tensor:
    """``CE(cos(z, e_.) / temperature, task)``, averaged over samples and over the layers that were pooled.

    Args:
        pooled: representations ``[batch, d]``, one per layer.
        tasks: resolved ids, an int for the batch or ``[batch]``.
        table: embeddings ``[T, d]``.
        temperature: of the cosine similarities.

    Returns:
        A scalar in at least fp32; 0, still attached to the table, where nothing was pooled.
    """
    if not pooled:
        return table.weight.sum() * 0
    representations = torch.stack(list(pooled))  # [layers, batch, d]
    embeddings = F.normalize(table.weight.to(representations.dtype), dim=-1)
    with torch.autocast(representations.device.type, enabled=False):
        logits = F.normalize(representations, dim=-1) @ embeddings.T / temperature  # [layers, batch, T]
    layers, batch, num_tasks = logits.shape
    if isinstance(tasks, int):
        target = torch.full((batch,), tasks, device=logits.device)
    else:
        target = tasks.reshape(-1).expand(batch)
    return F.cross_entropy(logits.reshape(-1, num_tasks), target.repeat(layers))


def contrastive_loss(
    model: nn.Module | TaskContext, table: TaskTable | None = None, temperature: float = 0.05
) -> Tensor:
    """Contrastive loss of the last training forward, unweighted: add ``contrastive_weight`` times it to yours.

    Representations are the inputs of the adapted layers whose width is ``task_embedding_dim``, averaged over the tokens
    that ``attention_mask`` keeps, each distinct tensor once. They are detached: the loss places the task embeddings
    among the representations of their tasks and leaves the model to its own loss (README, "Why these defaults").

    Args:
        model: a model from ``peft.get_peft_model(..., EPTConfig(...))`` after a forward pass in training mode, or the
            context that ``ept.use_tasks`` yields (then give ``table``, and ``temperature`` if not the default).

    Returns:
        A scalar. 0 where ``contrastive_weight`` is 0 or there is one task.

    Raises:
        ValueError: not an EPT model, no training forward yet, or a context without a table.
    """
    if isinstance(model, TaskContext):
        if table is None:
            raise ValueError("table is missing: a TaskContext needs the TaskTable that its layers share")
        return contrastive_task_loss(model.pooled or [], table.resolve(model.task_ids), table, temperature)
    from .tuner.model import ept_model  # the tuner imports this module's siblings

    return ept_model(model).contrastive_loss()
