"""Looking into an adapted model: tasks, routes, embeddings, parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adapter import PyramidAdapter
from .tuner.layer import EPTLinearLayer
from .tuner.model import EPTModel, ept_model


def _active(tuner: EPTModel, adapter_name: str | None) -> str:
    name = adapter_name or next(iter(tuner.active_adapters), None)
    if name not in tuner.peft_config:
        raise ValueError(f"adapter_name must be one of {list(tuner.peft_config)}, got {name!r}")
    return name


def adapters(model: nn.Module, adapter_name: str | None = None) -> dict[str, PyramidAdapter]:
    """The adapter of every adapted layer, by the layer's name in the base model.

    Raises:
        ValueError: not an EPT model, or no adapter of that name.
    """
    tuner = ept_model(model)
    name = _active(tuner, adapter_name)
    return {
        path: module.ept_adapters[name]
        for path, module in tuner.model.named_modules()
        if isinstance(module, EPTLinearLayer) and name in module.ept_adapters
    }


def task_names(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    """Names of the tasks, or their ids as text where the config gives none."""
    tuner = ept_model(model)
    config = tuner.peft_config[_active(tuner, adapter_name)]
    return list(config.task_names or map(str, range(config.num_tasks)))


def task_embeddings(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """The task-embedding table ``[T, d]``, detached."""
    tuner = ept_model(model)
    return tuner.ept_task_tables[_active(tuner, adapter_name)].weight.detach()


@torch.no_grad()
def routing(model: nn.Module, adapter_name: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Which experts every task uses in every layer: ``{layer: (expert_index [T, top_k], gates [T, top_k])}``."""
    tuner = ept_model(model)
    tasks = list(range(tuner.ept_task_tables[_active(tuner, adapter_name)].num_tasks))
    return {path: adapter.route(tasks) for path, adapter in adapters(model, adapter_name).items()}


def parameter_breakdown(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Numbers in the seed, the kernels, the gates and the task embeddings of an adapter, and other trainable ones."""
    tuner = ept_model(model)
    parts = adapters(model, adapter_name).values()
    counts = {
        "seed": sum(adapter.A.numel() + adapter.B.numel() for adapter in parts),
        "kernels": sum(kernel.numel() for adapter in parts for kernel in adapter.kernels),
        "gates": sum(adapter.gate.numel() for adapter in parts),
        "task embeddings": tuner.ept_task_tables[_active(tuner, adapter_name)].weight.numel(),
    }
    trainable = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".ept_" not in n)
    return {**counts, "other": trainable}


def print_parameter_breakdown(model: nn.Module, adapter_name: str | None = None) -> None:
    """Print ``parameter_breakdown`` as one line, beside PEFT's ``print_trainable_parameters``."""
    counts = parameter_breakdown(model, adapter_name)
    parts = " || ".join(f"{name}: {count:,d}" for name, count in counts.items() if count or name != "other")
    print(f"{parts} || total: {sum(counts.values()):,d}")
