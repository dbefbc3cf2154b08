"""Kernels of Expert Pyramid Tuning: tensors in, tensors out. Importing touches no GPU and needs no toolchain."""

from ._moved import MOVED as _MOVED
from ._moved import install as _install
from .dispatch import available_backends, backend_for
from .folding import active_scales, fold_kernels
from .functional import fold_kept, fold_tasks, pyramid_delta, pyramid_linear, pyramid_merge, pyramid_weight
from .geometry import PyramidGeometry
from .problem import Kept
from .tracing import without_autocast

__all__ = [
    "Kept",
    "PyramidGeometry",
    "active_scales",
    "available_backends",
    "backend_for",
    "fold_kept",
    "fold_kernels",
    "fold_tasks",
    "pyramid_delta",
    "pyramid_linear",
    "pyramid_merge",
    "pyramid_weight",
    "without_autocast",
]

_install(_MOVED)
