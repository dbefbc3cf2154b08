"""Route tasks and fold kernels in one step, where the backend can; the one place that asks.

``backend_for`` the parameters decides, so that ``EPT_BACKEND`` holds here as for the ops. The modules are imported when
their backend first serves.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .dispatch import backend_for
from .geometry import PyramidGeometry
from .tracing import is_eager

#: Modules with ``fold_tasks`` and, where there is a limit, ``MOST_EXPERTS``; by the name of their backend.
_MODULES = {"cpu": ".native_fold", "triton": ".triton.fold"}

_loaded: dict[str, ModuleType] = {}


def _folder(device: torch.device) -> ModuleType | None:
    name = backend_for(device, torch.float32).name
    folder = _loaded.get(name)
    if folder is None and name in _MODULES:
        folder = _loaded[name] = importlib.import_module(_MODULES[name], __package__)
    return folder


def _check(geometry: PyramidGeometry, top_k: int, gate: Tensor, table: Tensor, kernels: Sequence[Tensor]) -> None:
    """What the native code takes on trust."""
    sizes = geometry.kernel_sizes
    if gate.shape[0] != len(sizes) or gate.dim() != 2:
        raise ValueError(f"gate must be [{len(sizes)} experts, d], got {list(gate.shape)}")
    if table.dim() != 2 or table.shape[1] != gate.shape[1]:
        raise ValueError(f"table must be [tasks, d={gate.shape[1]}], got {list(table.shape)}")
    if not 1 <= top_k <= len(sizes):
        raise ValueError(f"top_k must be from 1 to {len(sizes)}, got {top_k}")
    if tuple(kernel.numel() for kernel in kernels) != tuple(k * k for k in sizes):
        raise ValueError(f"kernels must be [k, k] with k in {sizes}, got {[list(kernel.shape) for kernel in kernels]}")


def fold_tasks(
    gate: Tensor,
    table: Tensor,
    tasks: int | Tensor | None,
    kernels: Sequence[Tensor],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> tuple[Tensor, Tensor] | None:
    """``(folded [G, folded_size], active [G, S] bool)`` by the backend that serves, or None where it cannot.

    It can with fp32 parameters that are contiguous and on one device, where nothing traces or transforms what happens
    to them (``is_eager``). Otherwise the caller composes a router, ``fold_kernels`` and ``active_scales``.

    Args:
        gate: ``[E, d]``. table: ``[T, d]``, the task embeddings.
        tasks: a row of the table; ``[G]`` int64 rows on its device; or None, all rows in order.
        kernels: one ``[k_e, k_e]`` per expert, in the order of ``geometry.kernel_sizes``.
        top_k: experts that a task selects, 1 to E. scaling: ``alpha / r``.

    Raises:
        IndexError: a task that the table lacks; for a tensor on a GPU the result is NaN instead.
        ValueError: a shape that does not fit the geometry, top_k out of range.
        ValueError, RuntimeError: as ``backend_for``.
    """
    _check(geometry, top_k, gate, table, kernels)
    parameters = (gate, table, *kernels)
    device, on_cpu = gate.device, gate.is_cpu
    if not (on_cpu or gate.is_cuda) or not is_eager(*parameters):
        return None
    for parameter in parameters:
        beside = parameter.is_cpu if on_cpu else parameter.device == device  # the first is several times as fast
        if not (beside and parameter.dtype is torch.float32 and parameter.is_contiguous()):
            return None
    folder = _folder(device)
    most = getattr(folder, "MOST_EXPERTS", None)
    if folder is None or (most is not None and gate.shape[0] > most):
        return None
    return folder.fold_tasks(gate, table, tasks, kernels, top_k, scaling, geometry)
