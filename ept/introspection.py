"""Look into an adapted model: tasks, routes, embeddings, parameters; fix a route of TuckA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .baselines.tucka.adapter import SharedRouter
from .layer_adapter import LayerAdapter
from .task_table import TaskTable
from .tuner.model import EPTModel, ept_model


def _active(tuner: EPTModel, adapter_name: str | None) -> str:
    name = adapter_name or next(iter(tuner.active_adapters), None)
    if name is None or name not in tuner.peft_config:
        raise ValueError(f"adapter_name must be one of {list(tuner.peft_config)}, got {name!r}")
    return name


def _method(tuner: EPTModel, adapter_name: str | None) -> str:
    return tuner.peft_config[_active(tuner, adapter_name)].peft_type


def adapters(model: nn.Module, adapter_name: str | None = None) -> dict[str, LayerAdapter]:
    """The adapter of every adapted layer, by the layer's name in the base model.

    Raises:
        ValueError: no adapter of one of this package's methods, or none of that name.
    """
    tuner = ept_model(model)
    return tuner.adapters(_active(tuner, adapter_name))


def task_names(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    """Names of the tasks, or their ids as text where the config gives none."""
    tuner = ept_model(model)
    config = tuner.peft_config[_active(tuner, adapter_name)]
    return list(config.task_names or map(str, range(config.num_tasks)))


def task_embeddings(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """The task-embedding table ``[T, d]``, detached.

    Raises:
        ValueError: a method without one.
    """
    tuner = ept_model(model)
    shared = tuner.ept_task_tables[_active(tuner, adapter_name)]
    if not isinstance(shared, TaskTable):
        raise ValueError(f"model has a {_method(tuner, adapter_name)} adapter, which has no task embeddings")
    return shared.weight.detach()


@torch.no_grad()
def routing(model: nn.Module, adapter_name: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Which experts every task uses in every layer: ``{layer: (expert_index [T, k], gates [T, k])}``.

    Raises:
        ValueError: a method that does not give experts to tasks.
    """
    tuner = ept_model(model)
    parts: dict[str, Any] = adapters(model, adapter_name)
    if not all(hasattr(adapter, "route") for adapter in parts.values()):
        raise ValueError(f"model has a {_method(tuner, adapter_name)} adapter, which does not give experts to tasks")
    tasks = list(range(tuner.ept_task_tables[_active(tuner, adapter_name)].num_tasks))
    return {path: adapter.route(tasks) for path, adapter in parts.items()}


def parameter_breakdown(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Numbers of trained parameters by their part (for EPT: seed, kernels, gates, task embeddings, other)."""
    tuner = ept_model(model)
    shared = tuner.ept_task_tables[_active(tuner, adapter_name)]
    counts: Counter[str] = Counter()
    for part in (*adapters(model, adapter_name).values(), shared):
        counts.update(part.part_sizes())
    trainable = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".ept_" not in n)
    return {**counts, "other": trainable}


def print_parameter_breakdown(model: nn.Module, adapter_name: str | None = None) -> None:
    """Print ``parameter_breakdown`` as one line, beside PEFT's ``print_trainable_parameters``."""
    counts = parameter_breakdown(model, adapter_name)
    parts = " || ".join(f"{name}: {count:,d}" for name, count in counts.items() if count or name != "other")
    print(f"{parts} || total: {sum(counts.values()):,d}")


def _shared(model: nn.Module, adapter_name: str | None) -> SharedRouter:
    tuner = ept_model(model)
    shared = tuner.ept_task_tables[adapter_name or tuner.active_adapters[0]]
    if not isinstance(shared, SharedRouter):
        raise ValueError("model must have a TuckA adapter: the one asked for is of another method")
    return shared


def group_load(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """How often each group was chosen since the model was made: ``[K]`` int64, on the router's device.

    Counted there without a host synchronisation, in training and evaluation; reading the result is one.

    Raises:
        ValueError: no TuckA adapter.
    """
    return _shared(model, adapter_name).router.group_load.clone()


def fix_route(model: nn.Module, group: int, weights: Sequence[float] | Tensor, adapter_name: str | None = None) -> None:
    """Treat every batch as if the router had chosen ``group`` with ``weights`` ``[t]``, until ``free_route``.

    The model is then one dense model, which ``merge_adapter`` and ``merge_and_unload`` can merge.

    Raises:
        ValueError: no TuckA adapter, a group that does not exist, or another number of weights than experts in a group.
    """
    _shared(model, adapter_name).fix(group, weights)


def free_route(model: nn.Module, adapter_name: str | None = None) -> None:
    """Route by the batch again. A merged adapter stays merged until it is unmerged.

    Raises:
        ValueError: no TuckA adapter.
    """
    _shared(model, adapter_name).free()
