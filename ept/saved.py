"""A saved adapter as it lies in its folder: config and tensors, by layer; the base model is not needed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import AdapterConfig
from .files import ADAPTER_FOLDER

#: What PEFT puts before the name of a module of the base model.
MODEL_PREFIX = "base_model.model."
LAYER_MARK = ".ept_adapters."
SHARED_MARK = ".ept_task_tables."


class AdapterError(ValueError):
    """A folder is not a saved adapter, or not one that can be done what was asked."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's config and tensors.

    Attributes:
        layers: layer's name in the base model -> name of a tensor within its adapter -> tensor.
        shared: tensors that all layers share, such as the task embeddings.
        other: all others by their key: heads and further ``modules_to_save``; with a method that is not of this
            package, everything.
    """

    folder: Path
    config: Any  # of a method of this package (AdapterConfig), or of PEFT
    layers: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]
    other: Mapping[str, Tensor]

    @property
    def method(self) -> str:
        return str(self.config.peft_type.value)

    @property
    def task_names(self) -> list[str]:
        """The tasks' names, or their ids as text; none with a method that is not of this package."""
        if not isinstance(self.config, AdapterConfig):
            return []
        return list(self.config.task_names or map(str, range(self.config.num_tasks)))


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read the adapter that ``save_pretrained`` or ``ept-train`` left in ``folder`` (or in its ``adapter`` folder).

    Raises:
        AdapterError: a file is missing or damaged, the method is unknown, or values are not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{str(folder)!r} is {'a file' if folder.exists() else 'not there'}; a folder is needed")
    if not (folder / CONFIG_NAME).exists() and (folder / ADAPTER_FOLDER / CONFIG_NAME).exists():
        folder = folder / ADAPTER_FOLDER
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise AdapterError(f"{str(folder)!r} has no {name}{_instead(folder, name)}")
    config = _read_config(folder)
    tensors = _read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    layers: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        owner, mark, part = key.partition(LAYER_MARK)
        if mark:
            if not tensor.is_floating_point():
                raise AdapterError(
                    f"{str(folder / SAFETENSORS_WEIGHTS_NAME)!r} holds {key} as {tensor.dtype}; numbers of a layer are "
                    "floating point"
                )
            layers.setdefault(owner.removeprefix(MODEL_PREFIX), {})[part] = tensor
        elif SHARED_MARK in key:
            shared[key.partition(SHARED_MARK)[2]] = tensor
        else:
            other[key] = tensor
    if isinstance(config, AdapterConfig) and not layers:
        raise AdapterError(f"{str(folder / SAFETENSORS_WEIGHTS_NAME)!r} holds no layer of an adapter of this package")
    return SavedAdapter(folder, config, layers, shared, other)


def _instead(folder: Path, name: str) -> str:
    pickled = folder / WEIGHTS_NAME
    if name == SAFETENSORS_WEIGHTS_NAME and pickled.exists():
        return f"; {pickled.name} can run code when read: save the adapter again as safetensors"
    return ""


def _read_config(folder: Path) -> PeftConfig:
    path = folder / CONFIG_NAME
    with _named(path, (OSError, ValueError, RecursionError)):
        content = json.loads(path.read_text(encoding="utf-8"))
    method = content.get("peft_type") if isinstance(content, dict) else None
    known = {str(getattr(one, "value", one)) for one in PEFT_TYPE_TO_CONFIG_MAPPING}
    if not isinstance(method, str) or method not in known:
        raise AdapterError(f"{str(path)!r}: peft_type is {method!r}, which is no known method")
    with _named(path, (TypeError, ValueError, KeyError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftConfig.from_pretrained(str(folder))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _named(path, (OSError, SafetensorError)), safe_open(path, framework="pt", device="cpu") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not iterable)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():  # float8 has no isfinite
            raise AdapterError(f"{str(path)!r} holds values that are not finite in {key}")
    return tensors


@contextmanager
def _named(path: Path, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Report an error of reading ``path`` as one of its folder."""
    try:
        yield
    except kinds as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
