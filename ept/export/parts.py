"""What every export shares: where it goes, a second model to merge in, and what of a model leaves it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import AdapterConfig
from ..files import write_atomically, write_json
from ..tuner.model import EPTModel
from ..tuner.quantised import dequantised, is_quantised


def check_target(path: str | Path, overwrite: bool, *, option: str = "overwrite=True") -> Path:
    """Refuse a place that holds something, before any work.

    Args:
        option: how the caller says ``overwrite``, for the message.

    Raises:
        FileExistsError: a file, or a folder with content and no ``overwrite``.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"path {str(path)!r} is a file; a folder is needed")
    if path.is_symlink():
        raise FileExistsError(f"path {str(path)!r} is a link; name the folder itself")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"path {str(path)!r} is not empty; {option} replaces the whole folder")
    return path


def write_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill an empty folder beside ``path``, then put it there in one step."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        write(folder)

    return write_atomically(path.absolute(), fill)


def shadow(tuner: EPTModel, adapter_name: str) -> EPTModel:
    """A copy of the tuner and its model with parameters of its own over the *same* storage; nothing is merged in it.

    Merging replaces a parameter's storage and never writes into it, so it takes memory for the merged weights alone
    and the original model does not notice.

    Args:
        adapter_name: made the active adapter, so that unloading leaves the modules trained with it.

    Raises:
        ValueError: a module is saved with the adapter that cannot be copied.
    """
    for path, module in tuner.model.named_modules():
        # PEFT's wrapper hands on every attribute, and a parametrised module copies itself without the wrapper.
        if isinstance(module, AuxiliaryTrainingWrapper) and hasattr(module, "__deepcopy__"):
            raise ValueError(
                f"module {path!r}, which is saved with the adapter, computes its weight at every call (a "
                "parametrisation), which no export can write: make it an ordinary parameter first"
            )
    memo: dict[int, object] = {id(tuner._trained): None}  # the last pass: may hold a graph, which cannot be copied
    for tensor in (*tuner.parameters(), *tuner.buffers()):
        plain = type(tensor) is nn.Parameter  # a quantised one is shared as it is: nobody replaces its storage
        memo[id(tensor)] = nn.Parameter(tensor.data, requires_grad=False) if plain else tensor
    for module in tuner.modules():  # what weight_norm's hook computed in the last pass has a graph too
        results = (value for value in module.__dict__.values() if isinstance(value, Tensor))
        memo |= {id(value): value.detach() for value in results}
    quantizer = getattr(tuner.model, "hf_quantizer", None)
    memo[id(quantizer)] = quantizer
    twin = copy.deepcopy(tuner, memo)
    if twin.merged_task is not None:
        twin.unmerge_adapter()
    twin.set_adapter(adapter_name, inference_mode=True)
    return twin


def dequantise(twin: EPTModel) -> None:
    """Give every quantised module of a shadow an ordinary weight, in the dtype of the model's other parameters."""
    model = twin.model
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and type(p) is nn.Parameter)
    for path, module in list(model.named_modules()):
        if is_quantised(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, dequantised(module, dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


HEAD_WEIGHTS, HEAD_DESCRIPTION = "head.safetensors", "head.json"


@dataclass
class Parts:
    """A plain model and what is around it.

    Attributes:
        model: the model to export; the whole base, or the part of it that its ``export_parts`` names.
        prefix: its path in the base, with a final dot; empty for the whole.
        saved: modules of ``model`` that are trained with the adapter (``modules_to_save``), by path in ``model``.
        head: tensors of the task's head outside ``model``; None where there is none.
        description: what ``head`` is, for ``head.json``.
    """

    model: nn.Module
    prefix: str
    saved: dict[str, nn.Module]
    head: dict[str, Tensor] | None = None
    description: dict[str, Any] = field(default_factory=dict)

    def name(self, config: AdapterConfig) -> str | None:
        """What to load for ``model``: the base that the adapter's config names, else where ``model`` came from."""
        return config.base_model_name_or_path or getattr(self.model, "name_or_path", None) or None

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors of ``saved``, by their names in the state dict of ``model``."""
        return {f"{path}.{key}": t for path, module in self.saved.items() for key, t in module.state_dict().items()}

    def inside(self, path: str, what: str) -> str:
        """A path in the base as one in ``model``.

        Raises:
            ValueError: it is not in ``model``.
        """
        if not path.startswith(self.prefix):
            raise ValueError(f"{what} {path!r} lies outside {self.prefix.rstrip('.')!r}, the part that is exported")
        return path.removeprefix(self.prefix)


def choose_adapter(tuner: EPTModel, adapter_name: str | None) -> str:
    """The adapter to export: the one named, or the only active one.

    Raises:
        ValueError: none of that name, or none named while several are active.
    """
    if adapter_name is None and len(tuner.active_adapters) == 1:
        adapter_name = tuner.active_adapters[0]
    if adapter_name not in tuner.peft_config:
        allowed = f"one of {list(tuner.peft_config)}"
        raise ValueError(f"adapter_name must be {allowed} (active: {tuner.active_adapters}), got {adapter_name!r}")
    return adapter_name


def resolve_task(tuner: EPTModel, adapter_name: str, task: int | str | None) -> int:
    """The id of one task of an adapter that can be expressed in weights.

    Raises:
        ValueError: a method whose update is no matrix, an unknown task, or none where there are several.
        TypeError: several tasks.
    """
    for adapter in tuner.adapters(adapter_name).values():
        adapter.check_mergeable()
    if task is not None and (isinstance(task, bool) or not isinstance(task, (int, str))):
        raise TypeError(f"task must be one id or name, got {task!r}")
    return tuner.ept_task_tables[adapter_name].resolve(task)


def check_all_in_layers(tuner: EPTModel, adapter_name: str, what: str) -> None:
    """Refuse an adapter with trained numbers that a file of updates has no place for.

    Raises:
        ValueError: trained biases of the base, or rows of an embedding.
    """
    config = tuner.peft_config[adapter_name]
    for name, default in (("bias", "none"), ("trainable_token_indices", None)):
        value = getattr(config, name)
        if value != default:
            raise ValueError(
                f"{what} writes updates of layers alone, but the adapter was trained with {name}={value!r}: "
                "ept.export_merged writes all that it has learned"
            )


def saved_modules(tuner: EPTModel, adapter_name: str) -> list[str]:
    """Paths of the modules that are trained and saved with an adapter."""
    return [
        path
        for path, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]


def take_parts(base: Any, saved: list[str], task: int) -> Parts:
    """Split an unloaded base. One with a method ``export_parts(task)`` is asked for its model and the task's head.

    That method returns ``(model, head, description)``: a submodule, the head's tensors and their description as JSON.
    """
    if not hasattr(base, "export_parts"):
        return Parts(base, "", {path: base.get_submodule(path) for path in saved})
    model, head, description = base.export_parts(task)
    prefix = next(path for path, module in base.named_modules() if module is model) + "."
    inside = {path.removeprefix(prefix): base.get_submodule(path) for path in saved if path.startswith(prefix)}
    return Parts(model, prefix, inside, head, description)


def write_head(folder: Path, parts: Parts) -> None:
    """Write ``head.safetensors`` and ``head.json``, if there is a head outside the model."""
    if parts.head is not None:
        tensors = {name: tensor.detach().contiguous() for name, tensor in parts.head.items()}
        save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
        write_json(folder / HEAD_DESCRIPTION, parts.description)
