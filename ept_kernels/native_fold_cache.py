"""Folded kernels of all tasks of a layer on a CPU, kept between calls that train nothing.

What is kept serves as long as every parameter it was made from holds the same bits, which native code compares: gate,
kernels and the embeddings of the tasks asked for, some tens of kilobytes. So nothing has to be cleared, and no way of
changing a parameter passes it by: an optimizer's, a loaded checkpoint's, ``parameter.data``, another process in shared
memory. (A version counter, PyTorch's own mark of a change, does not see the last two.) Comparing reads what folding
would read, and does nothing else with it.
"""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .geometry import PyramidGeometry
from .kept import FoldTasks, Kept

#: Above this many tasks, the first call after a change would fold a multitude for the few that it needs.
MOST_TASKS = 256

_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")


class _Fold(NamedTuple):
    """All tasks of a layer folded, and what from; ``rows`` fills with views of single tasks.

    ``layer`` and ``table`` are native copies of the parameters' values; ``rows`` may be filled by several threads.
    """

    top_k: int
    scaling: float
    geometry: PyramidGeometry
    parameters: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    layer: Any
    table: Any
    folded: Tensor
    active: Tensor
    rows: dict[int, tuple[Tensor, Tensor]]


def _snapshot(*arrays: Tensor) -> Any:
    return native.module().Snapshot([(array.data_ptr(), array.numel() * array.element_size()) for array in arrays])


def _table_snapshot(kept: Kept, table: Tensor) -> Any:
    """The copy that the layers of a model share; a new one where the table has changed."""
    if kept.value is None or kept.value[0] != table.numel() or not kept.value[1].equals([table.data_ptr()]):
        kept.value = table.numel(), _snapshot(table)
    return kept.value[1]


def unchanged(
    kept: Kept,
    tasks: int | Tensor | None,
    parameters: tuple[Tensor, ...],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> _Fold | None:
    """What is kept, if it is of the same parameters with the same values; see ``task_folding.fold_kept``."""
    fold: _Fold | None = kept.value
    if fold is None or fold.geometry is not geometry or fold.top_k != top_k or fold.scaling != scaling:
        return None
    if len(parameters) != len(fold.parameters) or not all(map(is_, parameters[:-1], fold.parameters)):
        return None  # the last one, the table, may be put together anew for each call
    # by ``map``: a loop would take longer than the comparison
    if not (all(map(_is_cpu, parameters)) and all(map(Tensor.is_contiguous, parameters))):
        return None  # ``parameter.data`` was given another tensor
    if {*map(_dtype, parameters)} != {torch.float32} or tuple(map(Tensor.numel, parameters)) != fold.sizes:
        return None
    addresses = [*map(Tensor.data_ptr, parameters)]
    table = addresses.pop()
    if not fold.layer.equals(addresses):
        return None
    width, count = parameters[-1].shape[1] * 4, len(fold.folded)
    if isinstance(tasks, int):
        same = fold.table.rows_equal(table, width, 0, 0, tasks)
    elif tasks is not None and tasks.numel() < count:
        rows = tasks.reshape(-1).to(torch.int64).contiguous()
        same = fold.table.rows_equal(table, width, rows.data_ptr(), len(rows), 0)
    else:
        same = fold.table.equals([table])
    return fold if same else None


def renew(
    kept: Kept,
    kept_table: Kept,
    parameters: tuple[Tensor, ...],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
    fold_tasks: FoldTasks,
) -> _Fold:
    """Fold all tasks and keep the result."""
    gate, *kernels, table = parameters
    layer, embeddings = _snapshot(gate, *kernels), _table_snapshot(kept_table, table)
    folded, active = fold_tasks(gate, table, None, kernels, top_k, scaling, geometry)
    sizes = tuple(parameter.numel() for parameter in parameters)
    kept.value = _Fold(top_k, scaling, geometry, parameters, sizes, layer, embeddings, folded, active, {})
    return kept.value
