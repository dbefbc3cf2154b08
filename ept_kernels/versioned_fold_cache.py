"""Folded kernels of all tasks of a layer on a GPU, kept between calls that train nothing.

To compare values would wait for the device. What is kept serves as long as every parameter it was made from is the same
tensor, at the same address, with the same version, which PyTorch counts up at every change in place: an optimizer's
step, a loaded checkpoint, another task's training. A write through ``parameter.data`` is not counted; a forward pass in
training mode drops what is kept, so that an optimizer which writes so is seen, too.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .geometry import PyramidGeometry
from .kept import FoldTasks, Kept, Stamp, captures

#: Above this many tasks, the first call after a change would fold a multitude for the few that it needs.
MOST_TASKS = 256


class _Fold(NamedTuple):
    """All tasks of a layer folded, and what from; ``rows`` fills with views of single tasks."""

    plan: tuple[int, float, PyramidGeometry]
    stamp: Stamp
    folded: Tensor
    active: Tensor
    rows: dict[int, tuple[Tensor, Tensor]]


def unchanged(
    kept: Kept,
    tasks: int | Tensor | None,
    parameters: tuple[Tensor, ...],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> _Fold | None:
    """What is kept, if it is of the same parameters; see ``task_folding.fold_kept``.

    Raises:
        IndexError: an int that is no row of the table.
    """
    fold: _Fold | None = kept.value
    if captures(parameters[0]):
        return None
    if fold is None or fold.plan != (top_k, scaling, geometry) or not fold.stamp.holds(*parameters):
        return None
    if isinstance(tasks, int) and not 0 <= tasks < len(fold.folded):
        raise IndexError(f"task_ids holds {tasks}; allowed: 0 to {len(fold.folded) - 1}")
    return fold


def renew(
    kept: Kept,
    kept_table: Kept,
    parameters: tuple[Tensor, ...],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
    fold_tasks: FoldTasks,
) -> _Fold | None:
    """Fold all tasks and keep the result; None where nothing can be kept: a graph is captured, versions are unknown.

    A captured graph must fold anew at every replay, or it would not see that parameters have changed.
    """
    gate, *kernels, table = parameters
    stamp = Stamp.of(*parameters)
    if stamp is None or captures(gate):
        return None
    folded, active = fold_tasks(gate, table, None, kernels, top_k, scaling, geometry)
    kept.value = _Fold((top_k, scaling, geometry), stamp, folded, active, {})
    return kept.value
