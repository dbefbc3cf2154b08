"""The one place where a backend is chosen.

``EPT_BACKEND`` forces a backend for the whole process and fails loudly if that backend cannot serve; without it the
first of ``AUTOMATIC`` that can serve does. Modules are imported when first asked for: importing the package touches no
GPU and needs neither Triton nor a compiled extension.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import torch

from .problem import Backend

_MODULES = {
    "triton": ".triton",
    "cuda": ".backends.cuda",
    "cpu": ".backends.cpu",
    "torch": ".backends.torch",
    "reference": ".backends.reference",
}

#: Backends by type of device, the fastest first; "torch" serves whatever they do not.
AUTOMATIC: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}

_loaded: dict[str, Backend] = {}
_chosen: dict[tuple[str | None, torch.device, torch.dtype], Backend] = {}
_warned = False


def load(name: str) -> Backend:
    """The backend of that name, whether it can serve or not."""
    if name not in _loaded:
        module: Any = importlib.import_module(_MODULES[name], __package__)
        _loaded[name] = module
    return _loaded[name]


def available_backends(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names that ``EPT_BACKEND`` accepts; with ``device``, those that can serve ``dtype`` there on this machine."""
    if device is None:
        return tuple(_MODULES)
    return tuple(name for name in _MODULES if load(name).unsupported(device, dtype) is None)


def automatic(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that serves ``dtype`` on ``device`` when none is forced.

    The first time that no kernel serves on a GPU, a UserWarning says why each refused; float64 is no kernel's.
    """
    global _warned
    refusals = []
    for name in AUTOMATIC.get(device.type, ()):
        if (reason := load(name).unsupported(device, dtype)) is None:
            return name
        refusals.append(f"{name}: {reason}")
    if device.type == "cuda" and dtype != torch.float64 and not _warned:
        _warned = True
        warnings.warn(
            f"plain PyTorch (backend 'torch') computes {dtype} on {device}, because no kernel of this package can. "
            f"{'; '.join(refusals)}. Details, and what would serve: python -m ept_kernels",
            stacklevel=2,
        )
    return "torch"


def backend_for(device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend that serves tensors of ``dtype`` on ``device``.

    Raises:
        ValueError: ``EPT_BACKEND`` names no backend.
        RuntimeError: ``EPT_BACKEND`` names a backend that cannot serve; the message says why.
    """
    forced = os.environ.get("EPT_BACKEND") or None
    backend = _chosen.get((forced, device, dtype))
    if backend is None:
        if forced is not None and forced not in _MODULES:
            allowed = ", ".join(_MODULES)
            raise ValueError(f"EPT_BACKEND={forced!r} is no backend; allowed: {allowed}, or unset to choose")
        if forced is not None and (reason := load(forced).unsupported(device, dtype)) is not None:
            raise RuntimeError(f"EPT_BACKEND={forced!r} cannot serve {dtype} on {device}: {reason}")
        backend = _chosen[forced, device, dtype] = load(forced or automatic(device, dtype))
    return backend


def saves_for_backward(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether forward saves intermediates for the backward; ``EPT_RECOMPUTE=1`` says no."""
    return backend_for(device, dtype).keeps and not recomputes()


def recomputes() -> bool:
    """Whether ``EPT_RECOMPUTE=1`` asks backends to save nothing for the backward."""
    return os.environ.get("EPT_RECOMPUTE") == "1"
