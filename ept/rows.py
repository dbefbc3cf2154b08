"""Which of a call's task ids every row of a layer's input belongs to.

Ids stand for samples, or for tokens where samples are packed. An adapted layer sees neither, only rows: one for every
entry of the leading dimensions of its input. How rows and ids belong together is a layout. Where none is known and
shapes do not say, a row might get the weights of another sample's task, so the call is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ept_kernels.tracing import is_exporting

from .mixture import TaskMixture

if TYPE_CHECKING:
    from .context import TaskContext
    from .tasks import ResolvedTasks

BATCH_FIRST, BATCH_SECOND, ROWS = "batch_first", "batch_second", "rows"

#: What a layout may be called, in ``ept.row_layout`` and in a config's ``row_layout``.
LAYOUTS = (BATCH_FIRST, BATCH_SECOND, ROWS)


class RowIndex:
    """A layout that says it row by row: the place in ``task_ids`` of every row's sample.

    Args:
        samples: int64 ``[rows]``; None: not known, so that layers refuse.
        cu_seqlens: integers ``[samples + 1]``, where each sample's rows begin and the last one's end.
    """

    def __init__(self, samples: Tensor | None, cu_seqlens: Tensor | None = None) -> None:
        self._samples, self._ends = samples, None if cu_seqlens is None else cu_seqlens[1:].contiguous()

    def of(self, rows: int) -> Tensor | None:
        """Places ``[rows]``, or None where there are another number of rows."""
        if self._ends is not None and self._samples is None:
            every = torch.arange(rows, device=self._ends.device, dtype=self._ends.dtype)
            self._samples = torch.searchsorted(self._ends, every, right=True)
        return self._samples if self._samples is not None and len(self._samples) == rows else None


Layout = str | RowIndex


@dataclass(frozen=True)
class Place:
    """What the model's structure says about the rows of one layer.

    Attributes:
        layout: how they run, where that is not plainly ``[batch, ...]``; None where it is, or nobody knows.
        known: whether the code around the layer is known to hold the batch first, or was declared to.
        listed: whether it stands in a list of modules: a 2-D input there may be tokens that some other part selected.
        doubt: why even one row for every id proves nothing (several images may belong to a sample), or None.
        plain: whether one row of a 3-D input for every id shows that these are the samples.
    """

    layout: str | None = None
    known: bool = True
    listed: bool = False
    doubt: str | None = None
    plain: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", self.layout is None and self.known and self.doubt is None)


#: Of a layer that its user has put where it is: the first dimension of its input is the batch.
PLAIN = Place()


def take(tasks: ResolvedTasks, places: Tensor | slice) -> Tensor | TaskMixture:
    """The tasks at some places of resolved ``tasks`` for several samples."""
    if isinstance(tasks, TaskMixture):
        return TaskMixture(tasks.weights[places])
    assert isinstance(tasks, Tensor), "one task for the batch has no places"
    return tasks[places]


def repeat(tasks: ResolvedTasks, times: int) -> Tensor | TaskMixture:
    """Every sample's task ``times`` in a row: of its beams, or its choices."""
    if isinstance(tasks, TaskMixture):
        return TaskMixture(tasks.weights.repeat_interleave(times, 0))
    assert isinstance(tasks, Tensor), "one task for the batch needs no repetition"
    return tasks.repeat_interleave(times)


def fit(tasks: ResolvedTasks, count: int, x: Tensor, context: TaskContext, place: Place, name: str) -> ResolvedTasks:
    """Tasks for the rows of x: one for each of N equal runs of rows, where N divides their number.

    Args:
        tasks: resolved ids or a mixture, of ``count`` samples or tokens.
        x: ``[..., in]``.
        name: of the layer, for the message.

    Raises:
        ValueError: it is not known which rows belong to which ids, and they differ.
    """
    if count == 1 or isinstance(tasks, int):
        return tasks
    layout = context.layout if context.layout is not None else place.layout
    lead = x.shape[:-1]
    key = (layout, lead, count, place)
    remembers = not torch.compiler.is_compiling()
    if remembers and key in context.fitted:
        return context.fitted[key]
    fitted = _fit(tasks, count, lead, context, place, layout)
    if fitted is None:
        fitted = context.one_task(tasks)
    if fitted is None:
        raise ValueError(_refusal(count, x, context, place, layout, name))
    if remembers:
        context.fitted[key] = fitted
    return fitted


def _fit(
    tasks: Tensor | TaskMixture, count: int, lead: torch.Size, context: TaskContext, place: Place, layout: Layout | None
) -> ResolvedTasks | None:
    if not lead:
        return None
    if isinstance(layout, RowIndex):
        places = layout.of(lead.numel())
        return None if places is None else take(tasks, places)
    if place.doubt is not None and layout is None:
        return None
    if layout == ROWS:
        return tasks if lead[0] % count == 0 or (context.shape is not None and lead[:2] == context.shape) else None
    if layout == BATCH_SECOND:
        device = tasks.weights.device if isinstance(tasks, TaskMixture) else tasks.device
        places = places_of(count, lead, context.shape, second=True, device=device)
        return None if places is None else take(tasks, places.reshape(-1))
    if context.shape is not None:  # an id for every token
        whole = lead[:2] == context.shape
        flat = len(lead) == 1 and lead[0] == count and context.shape[0] == 1 and not place.listed
        return tasks if whole or flat else None
    return tasks if lead[0] == count and _is_batch(lead, context, place, layout) else None


def places_of(
    count: int, lead: torch.Size, shape: tuple[int, ...] | None, *, second: bool, device: torch.device
) -> Tensor | None:
    """The place among ``count`` ids of every row of an input with the leading dimensions ``lead``, in its shape.

    Args:
        shape: ``[batch, sequence]`` of ids a token, or None with one a sample.
        second: whether the batch is the second dimension; else the first.

    Returns:
        int64 ``lead``, or None where ids and dimensions do not fit.
    """
    own = (count,) if shape is None else shape
    order = (1, 0) if second else (0, 1)
    if len(lead) < len(own) or (second and len(lead) < 2):
        return None
    if any(lead[order[i]] != size for i, size in enumerate(own)):
        return None
    places = torch.arange(count, device=device).view(own)
    if second:
        places = places.T if len(own) == 2 else places.view(1, count)
    return places.view(*places.shape, *(1 for _ in lead[places.dim() :])).expand(lead)


def _is_batch(lead: torch.Size, context: TaskContext, place: Place, layout: Layout | None) -> bool:
    """Whether a first dimension as long as the ids is the batch, not a number of something else by accident."""
    if layout == BATCH_FIRST:
        return True
    if len(lead) == 1:
        return not (place.listed and context.sequence)
    # An exported program serves every size; the layout is that of the example, which shows it.
    return place.known or is_exporting() or lead[1] != lead[0]


def _refusal(count: int, x: Tensor, context: TaskContext, place: Place, layout: Layout | None, name: str) -> str:
    ids = "sample" if context.shape is None else "token"
    if place.doubt is not None and layout is None:
        why = place.doubt
    elif isinstance(layout, RowIndex):
        why = "its rows are a selection of tokens that could not be followed to it"
    elif x.dim() > 2 and x.shape[0] == 1:
        why = "its input is one for all samples, such as relative positions, and cannot belong to several tasks"
    elif layout is not None:
        why = f"its layout is {layout!r}, which this shape does not fit"
    elif x.shape[0] == count:
        why = "its first dimension is as long as the ids, but may be another than the batch in a module that is unknown"
    else:
        why = "which of its rows belong to which id is not known"
    return (
        f"task_ids must hold one id for each of the {x.shape[0]} samples of x {list(x.shape)}, got {count} "
        f"(one a {ids}), in layer {name!r}: {why}, and rows of one task might get the weights of another. Ways out: "
        f"name the layer in exclude_modules; give one task for the whole batch; or declare how its rows run, by "
        f"row_layout in the config or ept.row_layout around the call (docs/rows.md)"
    )


@contextmanager
def row_layout(
    layout: str = ROWS, *, samples: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Iterator[None]:
    """Say how the rows run that adapted layers see inside the block; also a decorator, of a module's ``forward``.

    Args:
        layout: "batch_first": ``[batch, ...]``. "batch_second": ``[sequence, batch, ...]``. "rows": in the order of the
            batch, equally many consecutive rows for each of the ids (windows, patches, flattened tokens).
        samples: for "rows" in any order, such as tokens that were selected or sorted: which of the call's ids each of
            them has, counted from 0, int64 ``[rows]``.
        cu_seqlens: for "rows" of samples of different lengths: where each begins and the last ends, ``[samples + 1]``.

    Raises:
        ValueError: another layout, or ``samples`` or ``cu_seqlens`` that do not fit it.
    """
    from .context import current

    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    given = [tensor for tensor in (samples, cu_seqlens) if tensor is not None]
    if len(given) > 1 or (given and layout != ROWS):
        raise ValueError(f"samples or cu_seqlens, not both, may be given with layout='rows', got layout={layout!r}")
    for tensor in given:
        if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"samples and cu_seqlens must be 1-D integers, got {list(tensor.shape)} {tensor.dtype}")
    context = current()
    if context is None:
        yield
        return
    before, context.layout = context.layout, RowIndex(samples, cu_seqlens) if given else layout
    try:
        yield
    finally:
        context.layout = before
