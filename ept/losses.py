"""The method's own losses of a model: what to add to the task's loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import ContrastiveConfig
from .context import TaskContext
from .layer_adapter import WeightedLosses
from .task_table import TaskTable, contrastive_task_loss
from .tuner.model import ept_model


def auxiliary_losses(model: nn.Module) -> WeightedLosses:
    """The method's own losses of the last training forward pass: ``{name: (weight in the total, value)}``.

    In a distributed run every process must call it: MixLoRA sums over all of them.

    Args:
        model: a model from ``peft.get_peft_model`` with a config of this package.

    Raises:
        ValueError: another model, or a loss of a forward pass that has not been.
    """
    return ept_model(model).auxiliary_losses()


def auxiliary_loss(model: nn.Module) -> Tensor:
    """What to add to the task's loss after a training forward pass, a scalar: the weighted sum of the method's own.

    In evaluation it is 0. Where transformers' ``Trainer`` divides a step among accumulated batches and processes, and
    so gives ``num_items_in_batch`` to the pass, it is the part of this pass: the losses count once a step. In a loop of
    your own, divide the sum of both losses as you divide the task's.

    Raises:
        ValueError: as ``auxiliary_losses``.
    """
    tuner = ept_model(model)
    if not tuner.training:
        return torch.zeros((), device=next(model.parameters()).device)
    share = tuner.share_of_step()
    losses = [share * weight * value for weight, value in tuner.auxiliary_losses().values()]
    return sum(losses[1:], losses[0]) if losses else torch.zeros((), device=next(model.parameters()).device)


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

    tuner = ept_model(model)
    name = tuner.active_adapters[0]
    config, shared = tuner.peft_config[name], tuner.ept_task_tables[name]
    if not isinstance(config, ContrastiveConfig):
        raise ValueError(f"model has a {config.peft_type} adapter, which has no contrastive loss")
    if config.contrastive_weight == 0:
        return torch.zeros((), device=shared.device)
    return tuner.auxiliary_losses()["contrastive_loss"][1]
