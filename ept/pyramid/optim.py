"""Parameter groups: which learning rate each part of an adapter wants (docs/recipe.md)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..task_table import TaskTable
from .adapter import PyramidAdapter

#: Learning rate of the kernels over the base rate.
KERNEL_LR_RATIO = 10.0

#: Learning rate of the gates over the base rate, for one entry of a task embedding; divided by the embedding's width.
GATE_LR_RATIO = 8.0


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    kernel_lr_ratio: float = KERNEL_LR_RATIO,
    gate_lr_ratio: float = GATE_LR_RATIO,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: kernels at ``lr * kernel_lr_ratio``, gates at ``lr * gate_lr_ratio / d``.

    A gate's logit sums d products, one per entry of a task embedding, and an Adam step moves every entry by the
    learning rate: at ``lr`` itself a logit would move by about ``lr * d`` a step, and noise would settle routing.

    Adapter parameters get no weight decay: an optimizer that decays would pull the kernels of unselected experts, whose
    gradient is zero, towards zero. Other trainable parameters (heads) get ``weight_decay``.

    Args:
        model: a PEFT model, or any module that holds ``EPTLinear`` layers.
        lr: base learning rate, of the seed, the task embeddings and all other trainable parameters.

    Returns:
        Non-empty groups, each with "params", "lr", "weight_decay" and a "name".

    Raises:
        ValueError: a rate that is not positive, or nothing trainable.
    """
    for name, rate in (("lr", lr), ("kernel_lr_ratio", kernel_lr_ratio), ("gate_lr_ratio", gate_lr_ratio)):
        if not rate > 0:
            raise ValueError(f"{name} must be > 0, got {rate!r}")
    owner: Any
    for owner in model.modules():  # PEFT may have made all of an adapter trainable
        if hasattr(owner, "freeze_finished"):
            owner.freeze_finished()
            owner.recipe_missing.discard("ept.parameter_groups")
    kernels: dict[int, nn.Parameter] = {}
    gates: dict[int, dict[int, nn.Parameter]] = {}
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, PyramidAdapter):
            kernels |= {id(kernel): kernel for kernel in module.kernels}
            width = module.in_features if module.by_token else module.task_table.dim  # FSDP1's shards are flat
            for rows in module.row_parameters("gate"):
                gates.setdefault(width, {})[id(rows)] = rows
            shared |= {id(factor): factor for factor in (module.A, module.B)}
        elif isinstance(module, TaskTable):
            shared |= {id(rows): rows for rows in module.row_parameters("weight")}
    adapter = {*kernels, *shared, *(key for group in gates.values() for key in group)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in adapter]
    groups: list[dict[str, Any]] = [
        {"name": "seed and task embeddings", "params": list(shared.values()), "lr": lr, "weight_decay": 0.0},
        {"name": "other", "params": others, "lr": lr, "weight_decay": weight_decay},
        {"name": "kernels", "params": list(kernels.values()), "lr": lr * kernel_lr_ratio, "weight_decay": 0.0},
    ]
    for width, rows_of_gates in gates.items():
        name, rate = f"gates of width {width}", lr * gate_lr_ratio / width
        groups.append({"name": name, "params": list(rows_of_gates.values()), "lr": rate, "weight_decay": 0.0})
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model has no trainable parameters")
    return groups
