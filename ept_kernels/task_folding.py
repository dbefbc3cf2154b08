"""Route tasks and fold kernels in one step, where the backend can; the one place that asks.

``backend_for`` the parameters decides, so that ``EPT_BACKEND`` holds here as for the ops. The modules are imported when
their backend first serves.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from operator import attrgetter
from types import ModuleType

import torch
from torch import Tensor

from .dispatch import backend_for
from .geometry import PyramidGeometry
from .kept import Kept
from .tracing import is_eager

#: Modules with ``fold_tasks`` and, where there is a limit, ``MOST_EXPERTS``; by the name of their backend.
_MODULES = {"cpu": ".native_fold", "cuda": ".cuda_fold", "triton": ".triton.fold"}

#: Modules that keep folded kernels between calls: by the parameters' values on a CPU, by their versions on a GPU.
_CACHES = {"cpu": ".native_fold_cache", "triton": ".versioned_fold_cache", "cuda": ".versioned_fold_cache"}

_loaded: dict[str, ModuleType] = {}

_dtype, _device, _is_cpu = attrgetter("dtype"), attrgetter("device"), attrgetter("is_cpu")


def _module(modules: dict[str, str], device: torch.device) -> ModuleType | None:
    """That of the backend that serves ``device``."""
    path = modules.get(backend_for(device, torch.float32).name)
    if path is None:
        return None
    module = _loaded.get(path)
    if module is None:
        module = _loaded[path] = importlib.import_module(path, __package__)
    return module


def _check_tasks(tasks: int | Tensor | None) -> None:
    """Ids that native code would read as others: truth values, fractions, numbers of numpy."""
    if isinstance(tasks, Tensor):
        if tasks.is_meta:
            raise ValueError("tasks must hold ids, got a tensor on the meta device, which holds nothing")
        if tasks.dtype not in (torch.int64, torch.int32) or tasks.dim() > 1:
            raise ValueError(
                f"tasks must be a scalar or 1-D tensor of int64 or int32, got {list(tasks.shape)} of {tasks.dtype}"
            )
    elif tasks is not None and (isinstance(tasks, bool) or not isinstance(tasks, int)):
        raise TypeError(f"tasks must be an integer, an integer tensor or None, got {tasks!r}")


def _check(
    geometry: PyramidGeometry,
    top_k: int,
    scaling: float,
    gate: Tensor,
    table: Tensor,
    kernels: Sequence[Tensor],
) -> None:
    """What the native code takes on trust."""
    if not isinstance(geometry, PyramidGeometry):
        raise TypeError(f"geometry must be a PyramidGeometry, got {type(geometry).__name__}")
    for place, tensor in enumerate((gate, table, *kernels)):
        if not isinstance(tensor, Tensor):
            name = ("gate", "table", "every entry of kernels")[min(place, 2)]
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    sizes = geometry.kernel_sizes
    if gate.dim() != 2 or gate.shape[0] != len(sizes):
        raise ValueError(f"gate must be [{len(sizes)} experts, d], got {list(gate.shape)}")
    if table.dim() != 2 or table.shape[1] != gate.shape[1]:
        raise ValueError(f"table must be [tasks, d={gate.shape[1]}], got {list(table.shape)}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(sizes):
        raise ValueError(f"top_k must be from 1 to {len(sizes)}, got {top_k!r}")
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number, got {scaling!r}")
    if [kernel.shape for kernel in kernels] != [(k, k) for k in sizes]:
        raise ValueError(f"kernels must be [k, k] with k in {sizes}, got {[list(kernel.shape) for kernel in kernels]}")


def _server(gate: Tensor, table: Tensor, kernels: Sequence[Tensor]) -> ModuleType | None:
    """The module that routes and folds these parameters in one step, or None; ``fold_tasks`` says when there is one.

    Raises:
        ValueError, RuntimeError: as ``backend_for``.
    """
    parameters, device = (gate, table, *kernels), gate.device
    if not (gate.is_cpu or gate.is_cuda) or not is_eager(*parameters):
        return None
    if not all(map(Tensor.is_contiguous, parameters)) or {*map(_dtype, parameters)} != {torch.float32}:
        return None
    if not (all(map(_is_cpu, parameters)) if gate.is_cpu else {*map(_device, parameters)} == {device}):
        return None
    folder = _module(_MODULES, device)
    most = getattr(folder, "MOST_EXPERTS", None)
    return None if most is not None and gate.shape[0] > most else folder


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
        ValueError: a shape that does not fit the geometry, top_k out of range, tasks of another shape or dtype.
        TypeError: another type than these.
        ValueError, RuntimeError: as ``backend_for``.
    """
    _check_tasks(tasks)
    _check(geometry, top_k, scaling, gate, table, kernels)
    folder = _server(gate, table, kernels)
    return None if folder is None else folder.fold_tasks(gate, table, tasks, kernels, top_k, scaling, geometry)


def fold_kept(
    kept: Kept,
    kept_table: Kept,
    gate: Tensor,
    table: Tensor,
    tasks: int | Tensor | None,
    kernels: Sequence[Tensor],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """``(folded [G, folded_size], groups [N] or None, active [G, S])`` for the ops, from ``kept`` where it still holds.

    None where nothing is kept: gradients are on, something traces or transforms the call (``is_eager``) or captures it
    in a CUDA graph, ``fold_tasks`` would give None, or there are very many tasks. The tensors serve later calls, too:
    they are to be read only.

    Args:
        kept: this layer's. kept_table: the table's, for all layers that share it.
        gate, table, kernels, top_k, scaling, geometry: as ``fold_tasks``.
        tasks: a row of the table, for G = 1; scalar or ``[N]`` integer rows, which become ``groups`` of all T tasks;
            None, all T without ``groups``.

    Raises:
        IndexError, ValueError, TypeError, RuntimeError: as ``fold_tasks``.
    """
    _check_tasks(tasks)
    if not is_eager() or torch.is_grad_enabled():
        return None
    cache = _module(_CACHES, gate.device)
    if cache is None:
        return None
    parameters = (gate, *kernels, table)
    fold = cache.unchanged(kept, tasks, parameters, top_k, scaling, geometry)
    if fold is None:
        _check(geometry, top_k, scaling, gate, table, kernels)
        server = _server(gate, table, kernels)
        if len(table) > cache.MOST_TASKS or server is None:
            return None
        fold = cache.renew(kept, kept_table, parameters, top_k, scaling, geometry, server.fold_tasks)
        if fold is None:
            return None
        cache.unchanged(kept, tasks, parameters, top_k, scaling, geometry)  # refuses a task that the table lacks
    if not isinstance(tasks, int):
        return fold.folded, None if tasks is None else tasks.reshape(-1), fold.active
    row = fold.rows.get(tasks)
    if row is None:
        row = fold.rows[tasks] = fold.folded[tasks : tasks + 1], fold.active[tasks : tasks + 1]
    return row[0], None, row[1]
