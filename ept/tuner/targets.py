"""Which modules of a model an adapter will take, settled and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from ..adapter_config import AdapterConfig
from ..methods import method_of
from ..readers import find_reader
from .layer import base_features


def target_features(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """``(in_features, out_features)`` of every module that ``config`` targets in ``model``, by name.

    Raises:
        ValueError: a name in ``target_modules`` that matches nothing, nothing matched at all, or a targeted layer that
            does not fit ``config``, such as a scale larger than it.
        TypeError: a targeted module that cannot be adapted.
    """
    every = isinstance(config.target_modules, str)
    _maybe_include_all_linear_layers(config, model)
    if every and not isinstance(config.target_modules, str):  # "all-linear", in a model that an adapter has wrapped
        parts = (".original_module", ".modules_to_save.")
        found: Any = config.target_modules  # a set, which PEFT does not declare
        config.target_modules = type(found)(name for name in found if not any(part in name for part in parts))
    inside_tuner = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside_tuner)]
    matched = [name for name in names if check_target_module_exists(config, name)]
    if isinstance(config.target_modules, (set, list, tuple)):
        unknown = [key for key in config.target_modules if not any(n == key or n.endswith(f".{key}") for n in names)]
        if unknown:
            raise ValueError(
                f"target_modules names {sorted(unknown)}, which match no module; "
                f"this model has linear layers named {_linear_names(model)}"
            )
    if not matched:
        raise ValueError(
            f"target_modules={config.target_modules!r} (exclude_modules={config.exclude_modules!r}) matches no module; "
            f"this model has linear layers named {_linear_names(model)}"
        )
    features = {}
    for name in matched:
        module = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        reader = find_reader(model, name)
        if reader is not None and reader[1]:
            raise ValueError(
                f"target module {name!r} is read past: {reader[0]} takes its weight itself, as fused kernels do, where "
                "an adapter has no effect; name it in exclude_modules"
            )
        try:
            features[name] = base_features(base)
            method_of(config).adapter.check_features(config.for_layer(name), *features[name])
        except (TypeError, ValueError) as error:
            raise type(error)(f"target module {name!r}: {error}") from None
    return features


def tied_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of the layers ``names`` of ``model``, adapted or to be, those whose weight is another module's too, and whose."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(path)
    tied = {}
    for name in names:
        layer = model.get_submodule(name)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        weight = base._parameters.get("weight")
        sharing = [] if weight is None else holders[id(weight)]
        others = [path for path in sharing if not f"{path}.".startswith(f"{name}.")]
        if others:
            tied[name] = others[0]
    return tied


def _linear_names(model: nn.Module) -> list[str]:
    names = set()
    for name, module in model.named_modules():
        try:
            base_features(module)
        except TypeError:
            continue
        names.add(name.rpartition(".")[2])
    return sorted(names)
