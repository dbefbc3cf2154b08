"""The one place where a backend is chosen.

A backend is a module with a ``name`` and six functions: ``pyramid_weight``, ``pyramid_delta``, ``pyramid_linear`` and
their ``_backward`` twins, with the signatures of ``torch_backend``. Rows are 2-D, sizes are validated, autograd and
autocast are already out of the way. ``EPT_BACKEND`` forces a backend for the whole process and fails loudly if that
backend cannot serve; without it the first of ``automatic(device)`` that is available serves.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

_MODULES = {"torch": ".torch_backend", "reference": ".reference_backend"}
_loaded: dict[str, ModuleType] = {}


def available_backends() -> tuple[str, ...]:
    """Names that ``EPT_BACKEND`` accepts."""
    return tuple(_MODULES)


def automatic(device: torch.device) -> str:
    """The backend that serves tensors on ``device`` when none is forced."""
    return "torch"


def backend_for(device: torch.device) -> ModuleType:
    """The backend module that serves tensors on ``device``.

    Raises:
        ValueError: ``EPT_BACKEND`` names no backend.
    """
    name = os.environ.get("EPT_BACKEND") or automatic(device)
    backend = _loaded.get(name)
    if backend is None:
        if name not in _MODULES:
            raise ValueError(f"EPT_BACKEND={name!r} is no backend; allowed: {', '.join(_MODULES)}, or unset to choose")
        backend = _loaded[name] = importlib.import_module(_MODULES[name], __package__)
    return backend
