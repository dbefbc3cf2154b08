"""``Kept``: a value beside a module that its copies do not inherit, and ``Stamp``: what it was made from."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .geometry import PyramidGeometry


class Kept:
    """One value beside a module, in this process: copies and pickles of the module start without it.

    It is replaced, never changed, so threads may read and replace it as they please.
    """

    def __init__(self) -> None:
        self.value: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class FoldTasks(Protocol):
    """A backend's ``fold_tasks``."""

    def __call__(
        self,
        gate: Tensor,
        table: Tensor,
        tasks: int | Tensor | None,
        kernels: Any,
        top_k: int,
        scaling: float,
        geometry: PyramidGeometry,
    ) -> tuple[Tensor, Tensor]: ...


class Stamp(NamedTuple):
    """Tensors, and what tells whether their numbers have changed since: where these are, and how often written.

    A write through ``tensor.data`` is not counted.
    """

    tensors: tuple[Tensor, ...]
    marks: tuple[tuple[int, int], ...]

    @staticmethod
    def of(*tensors: Tensor) -> Stamp | None:
        """None for inference tensors, whose writes nobody counts."""
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return Stamp(tensors, _marks(tensors))

    def holds(self, *tensors: Tensor) -> bool:
        """Whether these are the same tensors, unchanged."""
        return (
            len(tensors) == len(self.tensors) and all(map(is_, tensors, self.tensors)) and _marks(tensors) == self.marks
        )


def _marks(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def captures(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured. What it reads must follow from parameters at every replay."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
