"""Following tokens through a part of a model that selects, sorts or splits them before its layers see them.

A mixture-of-experts block flattens its input ``[batch, sequence, d]`` and gives every expert some of the tokens. Inside
such a block the operations that move rows are repeated on a companion ``[..., 1]`` that holds each row's place among
the task ids. What other operations give is not followed, and a layer that reads it refuses a batch of several tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .context import TaskContext, current
from .rows import BATCH_FIRST, BATCH_SECOND, Place, RowIndex, places_of

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


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among a call's arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class FollowedForward:
    """``forward`` of a block that hands tokens to parts of itself, under a ``RowTracker`` where tasks are mixed.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.

    Args:
        place: how the rows of the block's own input run.
    """

    def __init__(self, block: nn.Module, place: Place) -> None:
        self.block, self.place = block, place
        self.replaced = block.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = current()
        x = first_tensor(args, kwargs)
        places = None if context is None or x is None or torch.compiler.is_compiling() else self._places(x, context)
        if context is None or x is None or places is None:
            return self._forward(*args, **kwargs)
        outer = context.tracker
        with RowTracker(x, places) as context.tracker:
            try:
                return self._forward(*args, **kwargs)
            finally:
                context.tracker = outer

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)

    def _places(self, x: Tensor, context: TaskContext) -> Tensor | None:
        count = context.count
        if count in (None, 0, 1) or context.uniform or x.dim() < 2:
            return None
        if context.tracker is not None and (known := context.tracker.places(x)) is not None:
            return known.view(x.shape[:-1])
        layout = context.layout if context.layout is not None else self.place.layout
        if layout not in (None, BATCH_FIRST, BATCH_SECOND) or (layout is None and self._doubtful(x)):
            return None
        return places_of(count, x.shape[:-1], context.shape, second=layout == BATCH_SECOND, device=x.device)

    def _doubtful(self, x: Tensor) -> bool:
        """Whether the first dimension of x may be another than the batch."""
        return self.place.doubt is not None or (not self.place.known and x.dim() > 2 and x.shape[0] == x.shape[1])


class EnterPart:
    """Hooks around a part of a followed block: what its layers see are the rows of its first argument.

    Args:
        selects: whether the part gets tokens that the block has selected; then they are followed to it, or not known.
    """

    def __init__(self, selects: bool) -> None:
        self.selects = selects

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = current()
        if context is None or context.tracker is None:
            return
        context.outer_layouts.append(context.layout)
        x = first_tensor(args, kwargs)
        places = None if x is None else context.tracker.places(x)
        if places is not None or self.selects:
            context.layout = RowIndex(places)


def leave_part(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The hook that undoes ``EnterPart``."""
    context = current()
    if context is not None and context.tracker is not None and context.outer_layouts:
        context.layout = context.outer_layouts.pop()
