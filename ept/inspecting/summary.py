"""What can be said of a saved adapter: parameters, gates, ranks, dead experts, likeness of tasks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.nn.functional as F
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from ..config import EPTConfig
from ..saved import AdapterError, SavedAdapter
from .experts import (
    Expert,
    Ranks,
    SavedPyramid,
    expert_kind,
    expert_labels,
    expert_views,
    saved_pyramid,
    task_gates,
)


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        in_features, out_features: of an EPT layer, at most this (the files hold ``ceil(size / k_min)``); else None.
        labels: what each expert is (kernel size, rank or number); empty where the method has no experts for tasks.
        gates: ``[task][expert]``, 0 where the task does not use the expert.
        experts, updates: of an EPT layer, its experts, and every task's whole update; else empty.
        dead: places of the experts that no task uses. dead_parameters: what their kernels and gates hold.
    """

    name: str
    parameters: int
    in_features: int | None = None
    out_features: int | None = None
    labels: tuple[int, ...] = ()
    gates: tuple[tuple[float, ...], ...] = ()
    experts: tuple[Expert, ...] = ()
    updates: tuple[Ranks, ...] = ()
    dead: tuple[int, ...] = ()
    dead_parameters: int = 0


@dataclass(frozen=True)
class Inspection:
    """Everything that ``ept-inspect`` shows.

    Attributes:
        settings: the config's values that shape the update. label_kind: what a layer's ``labels`` are.
        parameters: trained numbers by what they are. similarity: cosine of the tasks' embeddings ``[task][task]``.
        notes: what does not apply to this method, a sentence each.
    """

    folder: str
    method: str
    base_model: str | None
    settings: dict[str, Any]
    tasks: tuple[str, ...]
    parameters: dict[str, int]
    layers: tuple[Layer, ...]
    label_kind: str
    similarity: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """All trained numbers of the adapter."""
        return sum(self.parameters.values())

    @property
    def dead(self) -> tuple[int, int, int]:
        """Dead experts, experts, and the numbers that the dead ones hold; in the layers that are shown."""
        return (
            sum(len(layer.dead) for layer in self.layers),
            sum(len(layer.labels) for layer in self.layers),
            sum(layer.dead_parameters for layer in self.layers),
        )

    def as_json(self) -> dict[str, Any]:
        """All of it as plain dictionaries and lists."""
        return asdict(self)


_SETTINGS = (
    "r",
    "lora_alpha",
    "kernel_sizes",
    "kernel_pattern",
    "added_kernels",
    "kernel_size",
    "top_k",
    "alp_scaling",
    "num_experts",
)


def inspect_adapter(saved: SavedAdapter) -> Inspection:
    """Look into an adapter.

    Raises:
        AdapterError: tensors that do not fit the config.
    """
    names = saved.task_names
    gates, notes = task_gates(saved)
    pyramids = {name: saved_pyramid(saved, name) for name in saved.layers} if _is_pyramid(saved) else {}
    layers = tuple(_layer(saved, name, names, gates.get(name, ()), pyramids.get(name)) for name in saved.layers)
    if not pyramids:
        notes = (*notes, f"Effective ranks and pruning are for EPT; {saved.method} has no pyramid.")
    similarity: tuple[tuple[float, ...], ...] = ()
    embeddings = saved.shared.get("weight")
    if embeddings is not None and embeddings.dim() == 2 and len(embeddings) == len(names):
        unit = F.normalize(embeddings.double(), dim=-1)
        similarity = tuple(map(tuple, (unit @ unit.T).tolist()))
    elif names:
        notes = (*notes, "There are no task embeddings to compare.")
    settings = {name: getattr(saved.config, name) for name in _SETTINGS if hasattr(saved.config, name)}
    return Inspection(
        folder=str(saved.folder),
        method=saved.method,
        base_model=saved.config.base_model_name_or_path,
        settings=settings,
        tasks=tuple(names),
        parameters=_parameters(saved),
        layers=layers,
        label_kind=expert_kind(saved),
        similarity=similarity,
        notes=notes,
    )


def select(inspection: Inspection, *, task: str | None = None, layers: str | None = None) -> Inspection:
    """The part about one task, and about the layers in whose names the regular expression ``layers`` is found.

    Which experts are dead is still a matter of all tasks.

    Raises:
        AdapterError: there is no such task or layer, or ``layers`` is no regular expression.
    """
    if layers is not None:
        try:
            wanted = re.compile(layers)
        except re.error as error:
            raise AdapterError(f"--layers {layers!r} is not a regular expression: {error}") from None
        kept = tuple(layer for layer in inspection.layers if wanted.search(layer.name))
        if not kept:
            some = ", ".join(layer.name for layer in inspection.layers[:3])
            raise AdapterError(f"--layers {layers!r} is in no layer's name; there are {some or 'none'}, ...")
        inspection = replace(inspection, layers=kept)
    if task is not None:
        if task not in inspection.tasks:
            allowed = ", ".join(inspection.tasks) or "none"
            raise AdapterError(f"--task {task!r} is no task of this adapter; allowed: {allowed}")
        place = inspection.tasks.index(task)
        inspection = replace(
            inspection,
            tasks=(task,),
            layers=tuple(
                replace(layer, gates=layer.gates[place:][:1], updates=layer.updates[place:][:1])
                for layer in inspection.layers
            ),
            similarity=(),
        )
    return inspection


def _is_pyramid(saved: SavedAdapter) -> bool:
    return isinstance(saved.config, EPTConfig)


def _layer(
    saved: SavedAdapter,
    name: str,
    tasks: Sequence[str],
    gates: tuple[tuple[float, ...], ...],
    pyramid: SavedPyramid | None,
) -> Layer:
    count = sum(tensor.numel() for tensor in saved.layers[name].values())
    if pyramid is None:
        return Layer(name, count, labels=expert_labels(saved, name) if gates else (), gates=gates)
    experts = expert_views(pyramid, gates, tasks)
    dead = tuple(place for place, expert in enumerate(experts) if gates and not expert.tasks)
    width = pyramid.gate.shape[1]
    return Layer(
        name=name,
        parameters=count,
        in_features=pyramid.geometry.in_features,
        out_features=pyramid.geometry.out_features,
        labels=pyramid.geometry.kernel_sizes if gates else (),
        gates=gates,
        experts=experts,
        updates=tuple(pyramid.update_ranks(weights) for weights in gates),
        dead=dead,
        dead_parameters=sum(pyramid.geometry.kernel_sizes[place] ** 2 + width for place in dead),
    )


def _parameters(saved: SavedAdapter) -> dict[str, int]:
    """As ``ept.parameter_breakdown`` names them for EPT; for others, by the names of their tensors."""
    counts: Counter[str] = Counter()
    for tensors in saved.layers.values():
        for part, tensor in tensors.items():
            counts[_PARTS.get(part.partition(".")[0], part)] += tensor.numel()
    for part, tensor in saved.shared.items():
        counts["gates" if part == "gate" else "task embeddings" if part in ("weight", "embedding") else part] += (
            tensor.numel()
        )
    if _is_pyramid(saved):
        counts["seed"] = counts.pop("factors", 0)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(saved.config.peft_type)
    for key, tensor in saved.other.items():
        counts["adapter" if prefix and f".{prefix}" in key else "other"] += tensor.numel()
    order = ("seed", "factors", "kernels", "gates", "task embeddings", "adapter")
    return {part: counts[part] for part in sorted(counts, key=lambda p: order.index(p) if p in order else len(order))}


_PARTS = {"A": "factors", "B": "factors", "kernels": "kernels", "c": "kernels", "gate": "gates"}
