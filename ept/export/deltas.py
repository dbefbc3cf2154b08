"""``export_deltas``: all tasks of an adapter as one seed and a few numbers a task and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..baselines.dcft import DCFTAdapter
from ..files import write_json
from ..layer_adapter import LayerAdapter
from ..pyramid.adapter import PyramidAdapter
from ..tuner.model import EPTModel, ept_model
from ..tuner.quantised import has_dense_weight
from .factors import dcft_folded
from .format import FORMAT, HEAD, MANIFEST, MODULES, SEED, LayerEntry, fingerprint, task_file
from .parts import Parts, check_all_in_layers, choose_adapter, resolve_task, saved_modules, take_parts
from .shadow import shadow
from .target import check_target, write_folder


@singledispatch
def folded_kernels(adapter: LayerAdapter, task: int) -> Tensor:
    """The folded kernels of one resolved task, ``[sum of k * k]``, with all scaling in them.

    Raises:
        ValueError: a method without them.
    """
    raise ValueError(f"{type(adapter).__name__} has no folded kernels; export_deltas serves EPT and DCFT")


@folded_kernels.register
def _(adapter: PyramidAdapter, task: int) -> Tensor:
    return adapter.fold(task)[0][0]


@folded_kernels.register
def _(adapter: DCFTAdapter, task: int) -> Tensor:
    return dcft_folded(adapter)


@torch.no_grad()
def export_deltas(
    model: nn.Module,
    path: str | Path,
    *,
    tasks: Sequence[int | str] | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write every task as a small delta on the base: the seed once, and ``sum of k * k`` numbers a task and layer.

    With the default pyramid a task takes 120 numbers a layer: router, embeddings and experts are folded away.
    ``load_deltas`` and ``apply_delta`` make a task's merged weights of it; ``docs/export.md`` has the formula. A base
    with ``export_parts`` is taken as in ``export_merged``: the deltas are those of its encoder, each with its head.

    Args:
        model: a ``PeftModel`` with an EPT or DCFT adapter.
        path: folder to write. It appears complete or not at all.
        tasks: ids or names; None for all.
        adapter_name: default: the active one.
        overwrite: replace the whole folder where it is not empty.

    Returns:
        ``path``.

    Raises:
        ValueError: another method, token-level routing, an unknown task or one twice, an adapter that is not there, an
            adapted weight that is tied, or values that are not finite.
        FileExistsError: a file, or a folder with content.
    """
    tuner = ept_model(model)
    name = choose_adapter(tuner, adapter_name)
    check_all_in_layers(tuner, name, "export_deltas")
    shared = tuner.ept_task_tables[name]
    ids = [resolve_task(tuner, name, task) for task in (range(shared.num_tasks) if tasks is None else tasks)]
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"tasks must name at least one task, each once, got {tasks!r}")
    adapters: dict[str, Any] = tuner.adapters(name)  # folded_kernels refuses what has none
    folded = {task: {layer: folded_kernels(adapter, task) for layer, adapter in adapters.items()} for task in ids}
    tuner.check_mergeable(name)
    target = check_target(path, overwrite)
    twin = shadow(tuner, name)
    saved = saved_modules(twin, name)
    entries = {layer: _entry(twin, layer, adapter) for layer, adapter in adapters.items()}
    base = twin.unload()
    parts = {task: take_parts(base, saved, task) for task in ids}
    part = parts[ids[0]]
    seed = {f"{layer}.{key}": getattr(a, key) for layer, a in adapters.items() for key in ("A", "B")}
    files = {SEED: {part.inside(key, "layer"): tensor for key, tensor in seed.items()}}
    for index, task in enumerate(ids):
        files[task_file(index)] = _task_tensors(parts[task], folded[task])
    if modules := part.saved_tensors():
        files[MODULES] = modules
    for file, tensors in files.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{key} of {file} is not finite; nothing was written")
    names = shared.names or tuple(map(str, range(shared.num_tasks)))
    manifest = {
        "format": FORMAT,
        "method": tuner.peft_config[name].peft_type.value,
        "base_model": part.name(tuner.peft_config[name]),
        "tasks": [names[task] for task in ids],
        "heads": [parts[task].description for task in ids],
        "layers": {part.inside(layer, "layer"): asdict(entry) for layer, entry in entries.items()},
    }

    def write(folder: Path) -> None:
        for file, tensors in files.items():
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, folder / file, {"format": "pt"})
        write_json(folder / MANIFEST, manifest)

    return write_folder(target, write)


def _task_tensors(parts: Parts, folded: dict[str, Tensor]) -> dict[str, Tensor]:
    head = {f"{HEAD}{key}": tensor for key, tensor in (parts.head or {}).items()}
    return {parts.inside(layer, "layer"): kernels for layer, kernels in folded.items()} | head


def _entry(twin: EPTModel, layer: str, adapter: PyramidAdapter | DCFTAdapter) -> LayerEntry:
    base, geometry = twin.model.get_submodule(layer).get_base_layer(), adapter.geometry
    return LayerEntry(
        geometry.in_features,
        geometry.out_features,
        geometry.rank,
        geometry.scales,
        isinstance(base, Conv1D),
        fingerprint(base.weight) if has_dense_weight(base) else None,
    )
