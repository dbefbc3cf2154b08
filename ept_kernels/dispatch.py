"""The one place where a backend is chosen.

A backend is a module with a ``name``, six functions (``pyramid_weight``, ``pyramid_delta``, ``pyramid_linear`` and
their ``_backward`` twins, with the signatures of ``torch_backend``) and, unless it serves everything, a function
``unsupported(device, dtype)`` that says why it cannot serve, or None. One with ``fuses_dropout = True`` takes
``dropout_p`` and ``seed`` as well; for the others rows are dropped before they come. One with ``keeps = True`` takes
``keep`` and ``kept``, gives a ``library.Output`` and takes what that keeps in its backward. Rows are 2-D, sizes are
validated, autograd and autocast are already out of the way.
``EPT_BACKEND`` forces a backend for the whole process and fails loudly if that backend cannot serve; without it the
first of ``AUTOMATIC`` that can serve does. Modules are imported when first asked for: importing the package touches no
GPU and needs neither Triton nor a compiled extension.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .kept import Kept
from .library import Output

_MODULES = {
    "triton": ".triton",
    "cuda": ".cuda_backend",
    "cpu": ".native",
    "torch": ".torch_backend",
    "reference": ".reference_backend",
}

#: Backends by type of device, the fastest first; "torch" serves whatever they do not.
AUTOMATIC: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}

_loaded: dict[str, ModuleType] = {}
_chosen: dict[tuple[str | None, torch.device, torch.dtype], ModuleType] = {}
_warned = False


def _load(name: str) -> ModuleType:
    if name not in _loaded:
        _loaded[name] = importlib.import_module(_MODULES[name], __package__)
    return _loaded[name]


def _unsupported(backend: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    check = getattr(backend, "unsupported", None)
    return check(device, dtype) if check is not None else None


def serves(backend: ModuleType, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend takes tensors of ``dtype`` on ``device``."""
    return _unsupported(backend, device, dtype) is None


def available_backends(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names that ``EPT_BACKEND`` accepts; with ``device``, those that can serve ``dtype`` there on this machine."""
    if device is None:
        return tuple(_MODULES)
    return tuple(name for name in _MODULES if serves(_load(name), device, dtype))


def automatic(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that serves ``dtype`` on ``device`` when none is forced.

    The first time that no kernel serves on a GPU, a UserWarning says why each refused; float64 is no kernel's.
    """
    global _warned
    refusals = []
    for name in AUTOMATIC.get(device.type, ()):
        if (reason := _unsupported(_load(name), device, dtype)) is None:
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


def backend_for(device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The backend module that serves tensors of ``dtype`` on ``device``.

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
        if forced is not None and (reason := _unsupported(_load(forced), device, dtype)) is not None:
            raise RuntimeError(f"EPT_BACKEND={forced!r} cannot serve {dtype} on {device}: {reason}")
        backend = _chosen[forced, device, dtype] = _load(forced or automatic(device, dtype))
    return backend


def keeps_for_backward(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether forward keeps intermediates for the backward; ``EPT_RECOMPUTE=1`` says no."""
    return getattr(backend_for(device, dtype), "keeps", False) and not recomputes()


def recomputes() -> bool:
    """Whether ``EPT_RECOMPUTE=1`` asks backends to keep nothing for the backward."""
    return os.environ.get("EPT_RECOMPUTE") == "1"


def run(op: str, *args: Any) -> Any:
    """``pyramid_weight`` or its backward on its backend; a gradient that was not asked for is None."""
    return getattr(backend_for(args[0].device, args[0].dtype), op)(*args)


def run_forward(
    op: str,
    *args: Any,
    dropout_p: float,
    seed: Tensor | None,
    active: Tensor | None,
    keep: bool,
    kept: Kept | None = None,
) -> Output:
    """``pyramid_delta`` or ``pyramid_linear`` on its backend.

    A backend need not know of dropout where nothing is dropped.
    """
    backend = backend_for(args[0].device, args[0].dtype)
    options = {"active": active} if seed is None else {"active": active, "dropout_p": dropout_p, "seed": seed}
    if getattr(backend, "keeps", False):
        return getattr(backend, op)(*args, **options, keep=keep, kept=kept)
    return Output(getattr(backend, op)(*args, **options))


def run_backward(
    op: str, *args: Any, dropout_p: float, seed: Tensor | None, active: Tensor | None, kept: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """``pyramid_delta_backward`` or ``pyramid_linear_backward``; a gradient that was not asked for is None."""
    backend = backend_for(args[0].device, args[0].dtype)
    options = {"active": active} if seed is None else {"active": active, "dropout_p": dropout_p, "seed": seed}
    if kept:
        options.update(zip(("U", "A_hat", "B_hat"), kept, strict=True))
    return getattr(backend, op)(*args, **options)
