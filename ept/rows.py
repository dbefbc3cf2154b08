"""Which of a call's task ids every row of a layer's input belongs to.

Ids stand for samples, or for tokens where samples are packed. An adapted layer sees only rows: one for every entry of
the leading dimensions of its input. A layout says which rows belong to which id. Where no layout is known and shapes do
not tell, a row might get the weights of another sample's task, so the call is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ept_kernels.tracing import is_exporting

from .mixture import TaskMixture
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
        layout: how they run; None for plain ``[batch, ...]``, or where it is not known.
        known: whether the code around the layer is known, or declared, to hold the batch first.
        listed: whether it is in a list of modules: a 2-D input there may hold tokens that another part selected.
        doubt: why even one row for each id is no proof (a sample may have several images), or None.
        guessed: whether ``layout`` is only that of attention beside the layer.
        plain: whether a 3-D input with one entry for each id is known to hold the samples first.
    """

    layout: str | None = None
    known: bool = True
    listed: bool = False
    doubt: str | None = None
    guessed: bool = False
    plain: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", self.layout is None and self.known and self.doubt is None)


#: Of a layer that the user calls: the first dimension of its input is the batch.
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


@dataclass(frozen=True)
class Ids:
    """What a call's task ids stand for.

    Attributes:
        count: how many there are.
        shape: ``(batch, sequence)`` where there is an id for every token; None with one a sample.
        sequence: whether the batch has a dimension beside that of its samples.
    """

    count: int
    shape: tuple[int, int] | None = None
    sequence: bool = False


#: Whether a dimension of a layer's input holds the samples, as far as what made the input shows it.
Shown = Callable[[int], bool | None]


def tasks_of_rows(
    tasks: Tensor | TaskMixture, ids: Ids, lead: torch.Size, place: Place, layout: Layout | None, shown: Shown
) -> ResolvedTasks | None:
    """Tasks for the rows of an input with the leading dimensions ``lead``; None where that is not known."""
    if not lead:
        return None
    if isinstance(layout, RowIndex):
        places = layout.of(lead.numel())
        return None if places is None else take(tasks, places)
    if place.doubt is not None and layout is None:
        return None
    if layout == ROWS:
        return tasks if lead[0] % ids.count == 0 or (ids.shape is not None and lead[:2] == ids.shape) else None
    if layout == BATCH_SECOND and place.guessed:
        layout = _settle(lead, ids, shown)
        if layout is None:
            return None
    if layout == BATCH_SECOND:
        device = tasks.weights.device if isinstance(tasks, TaskMixture) else tasks.device
        places = places_of(ids.count, lead, ids.shape, second=True, device=device)
        return None if places is None else take(tasks, places.reshape(-1))
    if ids.shape is not None:
        # Where sequence and batch are equally long, a module that is unknown may hold either first.
        sure = place.known or layout == BATCH_FIRST or len(set(ids.shape)) == 2
        whole = lead[:2] == ids.shape and sure
        flat = len(lead) == 1 and lead[0] == ids.count and ids.shape[0] == 1 and not place.listed
        return tasks if whole or flat else None
    return tasks if lead[0] == ids.count and _is_batch(lead, ids, place, layout, shown) else None


def _settle(lead: torch.Size, ids: Ids, shown: Shown) -> Layout | None:
    """Which of two leading dimensions is the batch, beside attention that holds it second; None where it is unknown."""
    if ids.shape is not None or len(lead) < 2 or (lead[0] == ids.count) != (lead[1] == ids.count):
        return BATCH_FIRST if ids.shape is None and lead[0] == ids.count else BATCH_SECOND
    return next((name for dim, name in enumerate((BATCH_FIRST, BATCH_SECOND)) if shown(dim)), None)


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


def _is_batch(lead: torch.Size, ids: Ids, place: Place, layout: Layout | None, shown: Shown) -> bool:
    """Whether a first dimension as long as the ids is the batch, not a number of something else by accident."""
    if layout == BATCH_FIRST and not place.guessed:
        return True
    found = None if place.known else shown(0)
    if found is not None or layout == BATCH_FIRST:
        return found is not False
    if len(lead) == 1:
        return not (place.listed and ids.sequence)
    # An exported program serves every size; the layout is that of the example, which shows it.
    return place.known or is_exporting() or lead[1] != lead[0]


def refusal(ids: Ids, x: Tensor, place: Place, layout: Layout | None, name: str) -> str:
    """Why the layer ``name`` cannot give the rows of x their own tasks, and what its user can do."""
    each = "sample" if ids.shape is None else "token"
    if place.doubt is not None and layout is None:
        why = place.doubt
    elif isinstance(layout, RowIndex):
        why = "its rows are a selection of tokens that could not be followed to it"
    elif x.dim() > 2 and x.shape[0] == 1:
        why = "its input is one for all samples, such as relative positions, and cannot belong to several tasks"
    elif layout is not None:
        why = f"its layout is {layout!r}, which this shape does not fit"
    elif x.shape[0] == ids.count:
        why = "its first dimension is as long as the ids, but may be another than the batch in a module that is unknown"
    else:
        why = "which of its rows belong to which id is not known"
    return (
        f"task_ids must hold one id for each of the {x.shape[0]} samples of x {list(x.shape)}, got {ids.count} "
        f"(one a {each}), in layer {name!r}: {why}, and rows of one task might get the weights of another. Ways out: "
        f"name the layer in exclude_modules; give one task for the whole batch; or declare how its rows run, by "
        f"row_layout in the config or ept.row_layout around the call (docs/rows.md)"
    )


_Function = Callable[..., Any]

#: Operations that do to the companion what they do to its tensor.
_SAME_ARGUMENTS: set[_Function] = {
    Tensor.__getitem__,
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("split", "chunk", "index_select", "unbind")),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("transpose", "permute", "repeat_interleave")),
}

#: Operations that give the rows another shape in the same order.
_SAME_ORDER: set[_Function] = {
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("reshape", "flatten", "squeeze", "unsqueeze")),
    Tensor.view,
    Tensor.contiguous,
    *(getattr(Tensor, name) for name in ("to", "float", "half", "bfloat16", "double", "type", "type_as", "clone")),
    *(getattr(Tensor, name) for name in ("detach", "mul", "__mul__", "__rmul__", "__truediv__", "div")),
    torch.mul,
    F.dropout,
}


class RowTracker(TorchFunctionMode):
    """While entered, knows the places among the task ids of the rows of ``x [..., d]`` and of what is made of it.

    Operations that move rows are repeated on a companion ``[..., 1]`` that holds each row's place. What other
    operations give is not followed, and a layer that reads it refuses a batch of several tasks.

    Args:
        places: int64 ``[...]``.
    """

    def __init__(self, x: Tensor, places: Tensor) -> None:
        super().__init__()
        self._followed = {id(x): (x, places.unsqueeze(-1))}  # holds x: an id is only its own while it lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and id(args[0]) in self._followed:
            self._follow(func, args, kwargs or {}, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        x, companion = self._followed[id(args[0])]
        if func in _SAME_ARGUMENTS:
            try:
                moved = func(companion, *args[1:], **kwargs)
            except (IndexError, RuntimeError):  # it reaches into the last dimension
                return
        elif func in _SAME_ORDER and isinstance(result, Tensor) and result.numel() == x.numel():
            if result.dim() == 0 or result.shape[-1] != x.shape[-1]:
                return
            moved = companion.reshape(*result.shape[:-1], 1)
        else:
            return
        pairs = zip(result, moved, strict=True) if isinstance(result, (list, tuple)) else [(result, moved)]
        for made, own in pairs:
            if made.dim() and own.shape == (*made.shape[:-1], 1) and made.shape[-1] == x.shape[-1]:
                self._followed[id(made)] = (made, own)

    def places(self, x: Tensor) -> Tensor | None:
        """The place of every row of x, ``[rows]``, or None where x was not followed."""
        found = self._followed.get(id(x))
        return None if found is None else found[1].reshape(-1)
