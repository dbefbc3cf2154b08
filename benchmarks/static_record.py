"""Which kernels a call would launch on a GPU, and how Triton would specialise them, found without one.

A driver that names a target and nothing else stands in for the GPU's; tensors are on the meta device. Every launch goes
through ``ept_kernels.triton.launch``, every choice of tiles through ``tune.choose``: recording replaces both, so that
all candidates are met. Triton's hook before compilation hands over the specialisation instead of compiling.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from static_targets import TARGETS, Target
from triton import knobs
from triton.runtime.driver import driver

import ept_kernels.triton
from ept_kernels.triton import launch
from ept_kernels.triton.launch import Config


class TargetDriver:
    """Stands in for a GPU's driver: enough for Triton to specialise and compile, never to launch.

    Each target is a device of its own number, because Triton keeps what it compiled by device.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._number = list(TARGETS).index(target.name)

    def get_current_target(self) -> object:
        return self._target.gpu

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Let Triton take ``target`` for the current GPU.

    Raises:
        RuntimeError: this process interprets kernels, so it cannot compile them.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    previous = driver._active
    driver.set_active(TargetDriver(target))
    try:
        yield
    finally:
        driver.set_active(previous)


@dataclass(frozen=True)
class Call:
    """A call of an op. ``wide``: its tensors of rows are contiguous and every row starts on 16 bytes."""

    name: str
    wide: bool
    pyramid: str = ""


@dataclass(frozen=True)
class Launch:
    """A kernel specialised as one launch would have it: what is compiled, once however many launches share it.

    Attributes:
        module, kernel: where the kernel is. target, dtype: names. config: tiles.
        variant: compile-time switches that are on and optional tensors that are absent.
        call: the first call that launched it.
        specialisation: Triton's own description, for ``JITFunction.preload``.
    """

    module: str
    kernel: str
    target: str
    dtype: str
    config: Config
    variant: str
    call: Call
    specialisation: str = field(repr=False)


def _variant(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> str:
    names = [parameter.name for parameter in kernel.params]
    on = [name.lower() for name, value in constants.items() if value is True]
    absent = [f"no {name.removesuffix('_ptr')}" for name, value in zip(names, arguments, strict=False) if value is None]
    return ", ".join(on + absent)


def _submodules() -> list[Any]:
    package = ept_kernels.triton
    return [import_module(f"{package.__name__}.{each.name}") for each in pkgutil.iter_modules(package.__path__)]


@contextlib.contextmanager
def _replaced(module: Any, attribute: str, value: object) -> Iterator[None]:
    previous = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, previous)


def _try_all(key: object, candidates: Sequence[Config], device: torch.device, trial: Callable[[Config], object]):
    for config in candidates[1:]:
        trial(config)
    return candidates[0]


def record(target: Target, dtype: str, calls: Mapping[Call, Callable[[], object]]) -> list[Launch]:
    """The distinct launches of ``calls`` (on meta tensors of ``dtype``) on ``target``, with every candidate."""
    found: dict[tuple[str, str], Launch] = {}
    current: dict[str, Any] = {}

    def runner(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], config: Config) -> None:
        current["launch"] = (kernel, arguments, constants, config)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        kernel.warmup(*arguments, grid=grid, **constants, **dict(config.tiles), **options)

    def keep(*, compile: Mapping[str, Any], **_: Any) -> bool:
        kernel, arguments, constants, config = current["launch"]
        data = compile["specialization_data"]
        found.setdefault(
            (kernel.fn.__name__, data),
            Launch(
                kernel.fn.__module__,
                kernel.fn.__name__,
                target.name,
                dtype,
                config,
                _variant(kernel, arguments, constants),
                current["call"],
                data,
            ),
        )
        return True  # Triton then does not compile

    with contextlib.ExitStack() as stack:
        stack.enter_context(compiling_for(target))
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.jit_cache_hook = keep
        stack.enter_context(_replaced(launch, "runner", runner))
        for module in _submodules():
            if hasattr(module, "choose"):
                stack.enter_context(_replaced(module, "choose", _try_all))
        for call, start in calls.items():
            current["call"] = call
            start()
    return list(found.values())
