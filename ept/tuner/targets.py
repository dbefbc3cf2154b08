"""Which modules of a model an adapter targets: found and checked before anything is changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ..config import AdapterConfig
from ..methods import method_of
from ..readers import find_reader
from .layer import base_features, not_a_map

#: Inside PEFT's wrapper of a module that is saved with an adapter: its copies of the module.
_COPIES = (".original_module", ".modules_to_save.")


def target_features(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """``(in_features, out_features)`` of every module that ``config`` targets in ``model``, by name.

    "all-linear" passes over linears that are more than that, such as routers that derive from ``nn.Linear``.

    Raises:
        NoMatchingPeftModuleError: a name in ``target_modules`` that matches nothing, or nothing matched at all.
        ValueError: a targeted layer that does not fit ``config``, such as a scale larger than it.
        TypeError: a targeted module that cannot be adapted.
    """
    _check_saved(model, config)
    every = isinstance(config.target_modules, str)
    _maybe_include_all_linear_layers(config, model)
    if every and not isinstance(config.target_modules, str):  # "all-linear"
        found: Any = config.target_modules  # a set, which PEFT does not declare
        config.target_modules = type(found)(
            name for name in found if _is_wanted(config, name) and not_a_map(_base(model.get_submodule(name))) is None
        )
    names = module_names(model)
    matched = [name for name in names if check_target_module_exists(config, name)]
    if isinstance(config.target_modules, (set, list, tuple)):
        unknown = set(config.target_modules) - matching(config.target_modules, names)
        if unknown:
            raise NoMatchingPeftModuleError(
                f"target_modules names {sorted(unknown)}, which match no module; "
                f"this model has linear layers named {_linear_names(model, names)}"
            )
    if not matched:
        restricted = [
            f"{name}={getattr(config, name)!r}"
            for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
            if getattr(config, name) is not None
        ]
        raise NoMatchingPeftModuleError(
            f"target_modules={config.target_modules!r} ({', '.join(restricted) or 'all layers'}) matches no module; "
            f"this model has linear layers named {_linear_names(model, names)}"
        )
    features = {}
    for name in matched:
        module = model.get_submodule(name)
        reader = find_reader(model, name)
        if reader is not None and reader[1]:
            raise ValueError(
                f"target module {name!r} is read past: {reader[0]} takes its weight itself, as fused kernels do, where "
                "an adapter has no effect; name it in exclude_modules"
            )
        try:
            features[name] = base_features(_base(module))
            if (reason := not_a_map(_base(module))) is not None:
                raise TypeError(f"{type(_base(module)).__name__} is no linear map of its input: {reason}")
            method_of(config).adapter.check_features(config.for_layer(name), *features[name])
        except (TypeError, ValueError) as error:
            raise type(error)(f"target module {name!r}: {error}") from None
    _warn_of_idle_patterns(config, matched)
    return features


def _check_saved(model: nn.Module, config: AdapterConfig) -> None:
    """Raise ValueError if a module to save cannot be copied, as PEFT will do after it has changed the model."""
    saved = tuple(config.modules_to_save or ())
    for path, module in model.named_modules():
        if not any(path == name or path.endswith(f".{name}") for name in saved):
            continue
        for inner, part in module.named_modules(prefix=path):
            if any(isinstance(value, Tensor) and not value.is_leaf for value in part.__dict__.values()):
                raise ValueError(
                    f"modules_to_save: {inner!r} has a weight that a hook computes (weight_norm, spectral_norm, "
                    "pruning), which cannot be copied; use torch.nn.utils.parametrizations, or make it a parameter"
                )


def tied_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of the layers ``names``, those that share their weight with another module: ``{layer: the other}``."""
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


def module_names(model: nn.Module) -> list[str]:
    """Names of the modules of ``model``, without what adapters have put into it."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def matching(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of ``targets`` that name, or end the name of, at least one of ``names``."""
    names = list(names)
    return {key for key in targets if any(name == key or name.endswith(f".{key}") for name in names)}


def _is_wanted(config: AdapterConfig, name: str) -> bool:
    """Whether a linear layer is no copy and is in ``layers_to_transform``, which PEFT ignores for full names."""
    if any(part in name for part in _COPIES):
        return False
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return True
    parent, _, last = name.rpartition(".")
    probe: Any = copy.copy(config)
    probe.target_modules = {last}
    return bool(parent) and bool(check_target_module_exists(probe, name))


def _warn_of_idle_patterns(config: AdapterConfig, names: list[str]) -> None:
    """As PEFT does for ``rank_pattern`` and ``alpha_pattern``."""
    patterns = getattr(config, "kernel_pattern", None) or {}
    idle = [key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]
    if idle:
        warnings.warn(
            f"the following kernel_pattern keys match no adapted module and have no effect: {sorted(idle)}",
            RuntimeWarning,
            stacklevel=2,
        )


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _linear_names(model: nn.Module, names: list[str]) -> list[str]:
    found = set()
    for name in names:
        if any(part in name for part in _COPIES):
            continue
        try:
            base_features(_base(model.get_submodule(name)))
        except TypeError:
            continue
        found.add(name.rpartition(".")[2])
    return sorted(found)
