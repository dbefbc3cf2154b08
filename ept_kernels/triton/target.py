"""Which GPU kernels are compiled for: Triton's driver is asked, since it may compile for one that is not here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from triton import knobs
from triton.runtime.driver import driver


@lru_cache
def _target(device: int) -> tuple[str, Any]:
    """The kind of device and its architecture: a number for NVIDIA, a name for AMD."""
    target = driver.active.get_current_target()
    return target.backend, target.arch


def family() -> str:
    """What tiles suit the current device.

    Returns:
        ``"wide"``: NVIDIA's data-centre GPUs of compute capability 9 and 10, whose matrix instructions read shared
        memory, so that registers are left for larger tiles, and that have 227 KiB of it. ``"cdna"``: AMD, 64 lanes a
        warp and 64 KiB. ``"safe"``: every other GPU; its tiles fit 255 registers and 99 KiB.
    """
    if knobs.runtime.interpret:
        return "safe"
    backend, arch = _target(driver.active.get_current_device())
    if backend == "hip":
        return "cdna"
    return "wide" if arch // 10 in (9, 10) else "safe"
