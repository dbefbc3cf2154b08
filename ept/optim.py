"""Parameter groups: which learning rate each part of an adapter wants."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import PyramidAdapter
from .tasks import TaskTable

#: Learning rate of the kernels over that of everything else (README, "Why these defaults").
KERNEL_LR_RATIO = 10.0


def parameter_groups(
    model: nn.Module, lr: float, *, kernel_lr_ratio: float = KERNEL_LR_RATIO, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: kernels at ``lr * kernel_lr_ratio``, everything else trainable at ``lr``.

    Adapter parameters get no weight decay: an optimizer that decays would pull the kernels of unselected experts, whose
    gradient is zero, towards zero. Other trainable parameters (heads) get ``weight_decay``.

    Args:
        model: a PEFT model, or any module that holds ``EPTLinear`` layers.
        lr: base learning rate.

    Returns:
        Non-empty groups, each with "params", "lr", "weight_decay" and a "name".

    Raises:
        ValueError: a rate that is not positive, or nothing trainable.
    """
    if not lr > 0:
        raise ValueError(f"lr must be > 0, got {lr!r}")
    if not kernel_lr_ratio > 0:
        raise ValueError(f"kernel_lr_ratio must be > 0, got {kernel_lr_ratio!r}")
    kernels: dict[int, nn.Parameter] = {}
    routed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, PyramidAdapter):
            kernels |= {id(kernel): kernel for kernel in module.kernels}
            routed |= {id(p): p for p in (module.A, module.B, module.gate)}
        elif isinstance(module, TaskTable):
            routed[id(module.weight)] = module.weight
    others = [p for p in model.parameters() if id(p) not in kernels and id(p) not in routed]
    groups = [
        {"name": "kernels", "params": list(kernels.values()), "lr": lr * kernel_lr_ratio, "weight_decay": 0.0},
        {"name": "seed and router", "params": list(routed.values()), "lr": lr, "weight_decay": 0.0},
        {"name": "other", "params": others, "lr": lr, "weight_decay": weight_decay},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model has no trainable parameters")
    return groups
