"""Which kernels a call would launch on a GPU, and how Triton would specialise them, found without one.

A driver that names a target and nothing else stands in for the GPU's; tensors are on the meta device. Every launch goes
through ``ept_kernels.triton.launch``, every choice of tiles through ``tune.choose``: recording replaces both, so that
all candidates are met. Triton's hook before compilation tells the specialisation, and keeps Triton from compiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from targets import TARGETS, Target
from triton import knobs
from triton.runtime.driver import driver

from ept_kernels.triton import fused, launch
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
    previous = driver._active if hasattr(driver, "_active") else driver.active  # the latter asks for a GPU from 3.5 on
    driver.set_active(TargetDriver(target))
    try:
        yield
    finally:
        driver.set_active(previous)


@dataclass(frozen=True)
class Call:
    """A call of an op. ``wide``: its tensors of rows are contiguous and every row starts on 16 bytes."""

    name: str
    wide: bool = True


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel specialised as one launch would have it: what is compiled, once however many launches share it.

    Attributes:
        kernel: its name. target, dtype: names. config: tiles. call: the first call that launched it.
        variant: compile-time switches that are on and optional tensors that are absent.
        compile: gives Triton's compiled kernel, for the target.
    """

    kernel: str
    target: str
    dtype: str
    config: Config
    variant: str
    call: Call
    compile: Callable[[], Any] = field(repr=False)

    @property
    def name(self) -> str:
        """As one line of a report."""
        tiles = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in self.config.tiles)
        built = f"{tiles}, {self.config.num_warps} warps, {self.config.num_stages} stages"
        return f"{self.kernel} ({self.variant or 'all'}) {built}, {self.target} {self.dtype}: {self.call.name}"


def _variant(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> str:
    names = [parameter.name for parameter in kernel.params]
    on = [name.lower() for name, value in constants.items() if value is True]
    absent = [f"no {name.removesuffix('_ptr')}" for name, value in zip(names, arguments, strict=False) if value is None]
    return ", ".join(on + absent)


def _try_all(key: object, candidates: Sequence[Config], device: torch.device, trial: Callable[[Config], object]):
    for config in candidates[1:]:
        trial(config)
    return candidates[0]


def record(target: Target, dtype: str, calls: Mapping[Call, Callable[[], object]]) -> list[Launch]:
    """The distinct launches of ``calls`` (on meta tensors of ``dtype``) on ``target``, with every candidate."""
    found: dict[tuple[str, str], Launch] = {}
    current: dict[str, Any] = {}

    def runner(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], config: Config) -> None:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}

        def start() -> Any:
            return kernel.warmup(*arguments, grid=grid, **constants, **dict(config.tiles), **options)

        def compiled() -> Any:
            with compiling_for(target):
                return start()

        variant = _variant(kernel, arguments, constants)
        current["launch"] = Launch(kernel.fn.__name__, target.name, dtype, config, variant, current["call"], compiled)
        start()

    def keep(*, compile: Mapping[str, Any], **_: Any) -> bool:
        found.setdefault((current["launch"].kernel, compile["specialization_data"]), current["launch"])
        return True  # Triton then does not compile

    with (
        compiling_for(target),
        mock.patch.object(knobs.runtime, "jit_cache_hook", keep),
        mock.patch.object(launch, "runner", runner),
        mock.patch.object(fused, "choose", _try_all),
    ):
        for call, begin in calls.items():
            current["call"] = call
            begin()
    return list(found.values())
