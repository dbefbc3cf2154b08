"""Experts of a saved adapter: which task uses which, with what weight, and what rank each can add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ept.baselines.moelora import MOELoRAConfig
from ept.baselines.more import MoREConfig
from ept.config import EPTConfig
from ept.inspecting.folder import AdapterError, SavedAdapter
from ept.inspecting.pyramid import SavedPyramid
from ept.inspecting.ranks import ranks_of, tolerance
from ept.layer_adapter import LayerAdapter
from ept.methods import method_of

from ..config import AdapterConfig
from ..pyramid.router import route, route_stages

Gates = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Expert:
    """One expert of an EPT layer.

    Attributes:
        kernel_rank: numerical rank of its kernel K. effective_rank: ``r * kernel_rank``, the rank of its update.
        entropy: how many directions K uses evenly (``ranks.Ranks.entropy``). norm: Frobenius norm of K.
        tasks: names of the tasks that use it.
    """

    kernel_size: int
    kernel_rank: int
    effective_rank: int
    entropy: float
    norm: float
    tasks: tuple[str, ...]


def expert_views(pyramid: SavedPyramid, gates: Gates, tasks: Sequence[str]) -> tuple[Expert, ...]:
    """Every expert of a layer; ``gates``: ``[task][expert]``, or empty where gates are not a task's."""
    views = []
    for place, kernel in enumerate(pyramid.kernels):
        size = len(kernel)
        ranks = ranks_of(kernel, tolerance(size, size, kernel.dtype))
        users = tuple(task for task, weights in zip(tasks, gates, strict=False) if weights[place] > 0)
        effective = pyramid.geometry.rank * ranks.rank
        views.append(Expert(size, ranks.rank, effective, ranks.entropy, ranks.norm, users))
    return tuple(views)


def expert_labels(saved: SavedAdapter, layer: str) -> tuple[int, ...]:
    """What each expert of a layer is: its kernel size, rank or number; empty without experts for tasks."""
    config = saved.config
    if isinstance(config, EPTConfig):
        return config.for_layer(layer).all_kernel_sizes
    if isinstance(config, MoREConfig):
        return tuple(range(1, config.for_layer(layer).r + 1))
    return tuple(range(1, config.num_experts + 1)) if isinstance(config, MOELoRAConfig) else ()


def expert_kind(saved: SavedAdapter) -> str:
    """What ``expert_labels`` are, in words."""
    config = saved.config
    return (method_of(config).adapter if isinstance(config, AdapterConfig) else LayerAdapter).expert_kind


def task_gates(saved: SavedAdapter) -> tuple[dict[str, Gates], tuple[str, ...]]:
    """Layer -> weight ``[task][expert]``, 0 where the task does not use the expert; and notes where there is none.

    Raises:
        AdapterError: a gate or task table that does not fit the config.
    """
    config = saved.config
    if getattr(config, "routing", "task") == "token":
        return {}, ("Experts are chosen by every token, not by task: no gates, no dead experts, no update of a task.",)
    try:
        if isinstance(config, (EPTConfig, MoREConfig)):
            return {name: _routed(saved, name) for name in saved.layers}, ()
        if isinstance(config, MOELoRAConfig):
            weights = (saved.shared["embedding"][: config.num_tasks] @ saved.shared["gate"].T).softmax(-1)
            return dict.fromkeys(saved.layers, _tuples(weights)), ()
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"{str(saved.folder)!r}: gates do not fit the config: {error}") from error
    return {}, (f"{saved.method} does not give experts to tasks: no gates, no dead experts.",)


def _routed(saved: SavedAdapter, name: str) -> Gates:
    gate = saved.layers[name]["gate"]
    embeddings = saved.shared["weight"]
    if len(embeddings) != saved.config.num_tasks:
        raise AdapterError(
            f"{str(saved.folder)!r}: {len(embeddings)} task embeddings for {saved.config.num_tasks} tasks of the config"
        )
    if isinstance(saved.config, EPTConfig):
        stages = saved.config.for_layer(name).stages
        index, weights = route_stages(gate, embeddings, torch.arange(len(embeddings)), saved.config.top_k, stages)
    else:
        index, weights = route(gate, embeddings, 1)
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)  # 0 would say that the expert is not chosen
    return _tuples(torch.zeros(len(embeddings), len(gate), dtype=weights.dtype).scatter(1, index, weights))


def _tuples(weights: Tensor) -> Gates:
    return tuple(map(tuple, weights.detach().double().tolist()))
