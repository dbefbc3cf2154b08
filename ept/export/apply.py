"""From a base model and deltas to a task's merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ept_kernels import pyramid_merge

from ..files import read_json
from ..tuner.quantised import has_dense_weight
from .format import FORMAT, HEAD, MANIFEST, MODULES, SEED, LayerEntry, fingerprint, task_file


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
