"""All tasks of an adapter as one seed and a few numbers a task and layer, and the way back.

``export_deltas`` writes a folder that ``load_deltas`` reads: ``deltas.json`` lists tasks and layers;
``seed.safetensors`` holds ``<layer>.A`` and ``<layer>.B`` once for all tasks; ``task-<i>.safetensors`` holds the folded
kernels of the i-th task, ``<layer> [sum of k * k]``, and its head, if it has one outside the model, as ``head/<name>``;
``modules.safetensors`` holds other trained modules of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ept_kernels import PyramidGeometry, pyramid_merge

from ..baselines.dcft import DCFTAdapter
from ..files import read_json, write_json
from ..layer_adapter import LayerAdapter
from ..pyramid.adapter import PyramidAdapter
from ..tuner.model import EPTModel, ept_model
from ..tuner.quantised import has_dense_weight
from .lora import dcft_folded
from .parts import (
    Parts,
    check_all_in_layers,
    check_target,
    choose_adapter,
    resolve_task,
    saved_modules,
    shadow,
    take_parts,
    write_folder,
)

FORMAT = 1
MANIFEST, SEED, MODULES = "deltas.json", "seed.safetensors", "modules.safetensors"
HEAD = "head/"
_SAMPLED = 4096  # elements that tell a weight from another; all of them would cost seconds a gigabyte


def task_file(index: int) -> str:
    """Name of the file of the i-th task in the manifest."""
    return f"task-{index}.safetensors"


@dataclass(frozen=True)
class LayerEntry:
    """A layer in the manifest.

    Attributes:
        in_features, out_features, rank, scales: its geometry. Every scaling factor is in the folded kernels.
        transposed: whether the base stores ``[in, out]`` (GPT-2's ``Conv1D``).
        base: fingerprint of the base's weight; None for one that is not a dense float.
    """

    in_features: int
    out_features: int
    rank: int
    scales: tuple[int, ...]
    transposed: bool
    base: str | None

    @property
    def geometry(self) -> PyramidGeometry:
        return PyramidGeometry(self.in_features, self.out_features, self.rank, tuple(self.scales))


def fingerprint(weight: Tensor) -> str:
    """Dtype, shape and a hash of up to 4096 elements spread over a weight: another base, or a merged one, differs."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu().view(torch.uint8)
    digest = hashlib.blake2b(sample.numpy().tobytes(), digest_size=8).hexdigest()
    return f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)} {digest}"


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


class TaskDeltas:
    """What ``export_deltas`` wrote; made by ``load_deltas``.

    Attributes:
        tasks: names, or ids as text where the adapter has none.
        base_model: name of the base, as PEFT recorded it.
        layers: the adapted layers, by name.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.tasks: list[str] = manifest["tasks"]
        self.base_model: str | None = manifest["base_model"]
        self.layers = {name: LayerEntry(**entry) for name, entry in manifest["layers"].items()}
        self._heads: list[dict[str, Any]] = manifest["heads"]
        self._seed = load_file(path / SEED)
        self._modules = load_file(path / MODULES) if (path / MODULES).exists() else {}
        for name, layer in self.layers.items():
            geometry = layer.geometry
            _check_shape(self._seed, f"{name}.A", [geometry.rank, geometry.seed_width])
            _check_shape(self._seed, f"{name}.B", [geometry.seed_height, geometry.rank])

    def merged_weights(self, model: nn.Module, task: int | str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of ``model`` that differs under ``task``, by its name in the state dict, one at a time.

        The model itself does not change. Weights are added in at least fp32 and rounded once, to the base's dtype.

        Args:
            model: the base that the adapter was trained on, without an adapter.
            task: a name of ``tasks``, or an index into it.

        Raises:
            ValueError: an unknown task, or a model that is not that base.
        """
        folded = self._load_task(self._index(task))
        for name in self.layers:
            self._base_weight(model, name)  # all are checked before the first is given
        self._check_modules(model)
        return self._merge(model, folded)

    def head(self, task: int | str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A task's own head and its description, or None where heads belong to the model."""
        index = self._index(task)
        tensors = {k.removeprefix(HEAD): t for k, t in self._load_task(index).items() if k.startswith(HEAD)}
        return (tensors, self._heads[index]) if tensors else None

    def _index(self, task: int | str) -> int:
        if isinstance(task, str) and task in self.tasks:
            return self.tasks.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(self.tasks):
            return task
        raise ValueError(f"task must be one of {self.tasks} or 0 to {len(self.tasks) - 1}, got {task!r}")

    def _load_task(self, index: int) -> dict[str, Tensor]:
        try:
            tensors = load_file(self.path / task_file(index))
        except SafetensorError as error:
            raise ValueError(f"the deltas are damaged: {task_file(index)}: {error}") from error
        for name, layer in self.layers.items():
            _check_shape(tensors, name, [layer.geometry.folded_size])
        return tensors

    @torch.no_grad()
    def _merge(self, model: nn.Module, folded: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self.layers.items():
            weight = self._base_weight(model, name)
            dense = weight.T if layer.transposed else weight
            parts = (self._seed[f"{name}.A"], self._seed[f"{name}.B"], folded[name][None])
            A, B, kernels = (part.to(weight.device) for part in parts)
            merged = pyramid_merge(dense, A, B, kernels, layer.geometry)[0]
            yield f"{name}.weight", (merged.T if layer.transposed else merged).contiguous()
        yield from self._modules.items()

    def _base_weight(self, model: nn.Module, name: str) -> Tensor:
        try:
            layer: Any = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"model has no layer {name!r}; the deltas are of {self.base_model!r}") from None
        if not has_dense_weight(layer):
            raise ValueError(f"layer {name!r} of model ({type(layer).__name__}) has no dense float weight")
        expected, found = self.layers[name].base, fingerprint(layer.weight)
        if expected is not None and expected != found:
            raise ValueError(
                f"layer {name!r} of model is not the base that the deltas were made for ({self.base_model!r}), or has "
                f"a task applied already: its weight is {found}, expected {expected}"
            )
        return layer.weight.detach()

    def _check_modules(self, model: nn.Module) -> None:
        state = model.state_dict()
        for name, tensor in self._modules.items():
            found = list(state[name].shape) if name in state else "missing"
            if found != list(tensor.shape):
                raise ValueError(f"{name} of model is {found}, expected {list(tensor.shape)}")


def _check_shape(tensors: dict[str, Tensor], name: str, shape: list[int]) -> None:
    found = list(tensors[name].shape) if name in tensors else "missing"
    if found != shape:
        raise ValueError(f"the deltas are damaged: {name} is {found}, expected {shape}")


def load_deltas(path: str | Path) -> TaskDeltas:
    """Read what ``export_deltas`` wrote; a task's file is read when it is asked for.

    Raises:
        FileNotFoundError: nothing of that kind at ``path``.
        ValueError: another format, or damaged files.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"path {str(path)!r} holds no deltas ({MANIFEST})")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{str(path / MANIFEST)!r} is not of format {FORMAT}")
    try:
        return TaskDeltas(path, manifest)
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the deltas at {str(path)!r} are damaged: {error!r}") from error


@torch.no_grad()
def apply_delta(model: nn.Module, path: str | Path | TaskDeltas, task: int | str) -> nn.Module:
    """Put one task into a plain base model, in place; for another task start from the base again.

    Args:
        model: the base that the adapter was trained on, without an adapter.
        path: what ``export_deltas`` wrote, or ``load_deltas`` read.
        task: a name or index.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError, ValueError: as ``load_deltas`` and ``TaskDeltas.merged_weights``; nothing is changed then.
    """
    deltas = path if isinstance(path, TaskDeltas) else load_deltas(path)
    state = model.state_dict()  # references
    for name, tensor in deltas.merged_weights(model, task):
        state[name].copy_(tensor)
    return model
