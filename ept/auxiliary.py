"""What a method adds to the task's loss: EPT's and MoRE's contrastive loss, and whatever other methods have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer_adapter import WeightedLosses
from .tuner.model import ept_model


def auxiliary_losses(model: nn.Module) -> WeightedLosses:
    """The method's own losses of the last training forward pass: ``{name: (weight in the total, value)}``.

    In a distributed run every process must call it: MixLoRA counts over all of them.

    Args:
        model: a model from ``peft.get_peft_model`` with a config of this package.

    Raises:
        ValueError: another model, or a loss of a forward pass that has not been.
    """
    return ept_model(model).auxiliary_losses()


def auxiliary_loss(model: nn.Module) -> Tensor:
    """What to add to the task's loss after a training forward pass, a scalar: the weighted sum of the method's own.

    Raises:
        ValueError: as ``auxiliary_losses``.
    """
    losses = [weight * value for weight, value in auxiliary_losses(model).values()]
    return sum(losses[1:], losses[0]) if losses else torch.zeros((), device=next(model.parameters()).device)
