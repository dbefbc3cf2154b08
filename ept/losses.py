"""The contrastive task loss (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_kernels import without_autocast

from .context import TaskContext
from .contrastive_config import ContrastiveConfig
from .mixture import TaskMixture
from .tasks import ResolvedTasks, TaskTable


def contrastive_task_loss(
    pooled: Sequence[Tensor],
    tasks: ResolvedTasks,
    table: TaskTable,
    temperature: float,
    targets: Sequence[Tensor | None] = (),
) -> Tensor:
    """``CE(cos(z, e_.) / temperature, task)``, averaged over samples and over the layers that were pooled.

    Args:
        pooled: representations ``[batch, d]``, one per layer.
        tasks: resolved ids, an int for the batch or ``[batch]``, or a mixture.
        table: embeddings ``[T, d]``.
        temperature: of the cosine similarities.
        targets: the task of every representation of each layer, ``[batch]``, where ``tasks`` do not say it (packed
            samples); -100 is left out.

    Returns:
        A scalar in at least fp32; 0, still attached to the table, where nothing was pooled, the batch is empty,
        or the tasks are a mixture: a guess is no label.
    """
    dtype = torch.promote_types(table.weight.dtype, torch.float32)
    if isinstance(tasks, TaskMixture) or not any(len(rows) for rows in pooled):
        return table.weight[:0].sum(dtype=dtype)
    representations = torch.cat([rows.to(table.weight.device, dtype) for rows in pooled])  # [samples of all layers, d]
    with without_autocast(representations.device):
        logits = _unit(representations) @ _unit(table.weight.to(dtype)).T / temperature
        own = targets or [None] * len(pooled)
        wanted = [
            _targets(len(rows), tasks, logits.device) if target is None else target.to(logits.device)
            for rows, target in zip(pooled, own, strict=True)
        ]
        return F.cross_entropy(logits, torch.cat(wanted))


def _unit(rows: Tensor) -> Tensor:
    """Each row over its norm; zeros stay. First over its largest entry: squares of 1e20 leave the range of fp32."""
    largest = rows.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return F.normalize(rows / largest, dim=-1)


def _targets(rows: int, tasks: int | Tensor, device: torch.device) -> Tensor:
    """The task of each of a layer's rows; windows or beams of a sample are consecutive and share its task."""
    if isinstance(tasks, int):
        return torch.full((rows,), tasks, device=device)
    tasks = tasks.reshape(-1)
    return tasks.repeat_interleave(rows // len(tasks))


def contrastive_loss(
    model: nn.Module | TaskContext, table: TaskTable | None = None, temperature: float = 0.05
) -> Tensor:
    """Contrastive loss of the last training forward, unweighted: add ``contrastive_weight`` times it to yours.

    Representations are the inputs of the adapted layers whose width is ``task_embedding_dim``, averaged over the tokens
    that ``attention_mask`` keeps (where it has their shape; a decoder's over those that ``decoder_attention_mask``, or
    else ``labels``, keeps); consecutive readers of one tensor count once. They are
    detached: the loss places the task embeddings among the representations of their tasks and leaves the model to its
    own loss.

    Args:
        model: a model from ``peft.get_peft_model(..., EPTConfig(...))`` (or ``MoREConfig``) after a forward pass in
            training mode, or the context that ``ept.use_tasks`` yields (then give ``table``, and ``temperature`` if not
            the default).

    Returns:
        A scalar. 0 where ``contrastive_weight`` is 0 or there is one task.

    Raises:
        ValueError: not a model with such a loss, no training forward yet, or a context without a table.
    """
    if isinstance(model, TaskContext):
        if table is None:
            raise ValueError("table is missing: a TaskContext needs the TaskTable that its layers share")
        tasks = table.resolve(model.task_ids)
        return contrastive_task_loss(model.pooled or [], tasks, table, temperature, model.targets)
    from .tuner.model import ept_model  # the tuner imports this module's siblings

    tuner = ept_model(model)
    name = tuner.active_adapters[0]
    config, shared = tuner.peft_config[name], tuner.ept_task_tables[name]
    if not isinstance(config, ContrastiveConfig):
        raise ValueError(f"model has a {config.peft_type} adapter, which has no contrastive loss")
    if config.contrastive_weight == 0:
        return torch.zeros((), device=shared.device)
    return tuner.auxiliary_losses()["contrastive_loss"][1]
