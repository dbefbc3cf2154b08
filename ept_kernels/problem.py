"""What a call is, as every backend gets it, what a backend must do with it, and what a layer may keep between calls.

Rows are 2-D, sizes are validated, autograd and autocast are out of the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .geometry import PyramidGeometry


class Problem(NamedTuple):
    """Rows and the adapter that serves them.

    Attributes:
        x: ``[T, in]``. A: ``[r, ceil(in / k_min)]``. B: ``[ceil(out / k_min), r]``.
        folded: ``[G, sum(k * k)]``, packed as ``fold_kernels`` packs.
        groups: ``[N]``, the row of ``folded`` for each of N equal runs of rows; None: row 0 for all. A row whose group
            does not exist becomes NaN on a GPU; on a CPU it is an IndexError.
        active: ``[G, S]`` bool, False where a kernel is zero and wants no gradient; None says nothing.
        scales: ascending.
        dropout_p, seed: with ``seed [1]`` the adapter sees x with entries dropped at ``dropout_p``, the same ones in
            backward. Only for backends that fuse dropout.
    """

    x: Tensor
    A: Tensor
    B: Tensor
    folded: Tensor
    groups: Tensor | None
    active: Tensor | None
    out_features: int
    scales: Sequence[int]
    dropout_p: float = 0.0
    seed: Tensor | None = None


class Base(NamedTuple):
    """The frozen linear map under an adapter: ``weight [out, in]`` and ``bias [out]``."""

    weight: Tensor
    bias: Tensor | None


class Output(NamedTuple):
    """``y [T, out]`` and what the backward may use again (``backends.gpu``); None where nothing is saved."""

    y: Tensor
    U: Tensor | None = None
    A_hat: Tensor | None = None
    B_hat: Tensor | None = None


class Routing(NamedTuple):
    """Tasks, and the parameters that give each its folded kernels (spec sections 2 and 3).

    The gates of a task are the softmax of its ``top_k`` highest logits ``gate @ table[task]``, of equal ones the first;
    with ``top_k = 1`` the value is 1 and the gradient that of the softmax over all experts.

    Attributes:
        gate: ``[E, d]``. table: ``[T, d]``, the task embeddings.
        tasks: a row of the table; ``[G]`` rows; or None, all rows in order.
        kernels: one ``[k_e, k_e]`` per expert, in the order of ``geometry.kernel_sizes``.
        scaling: ``alpha / r``.
    """

    gate: Tensor
    table: Tensor
    tasks: int | Tensor | None
    kernels: tuple[Tensor, ...]
    top_k: int
    scaling: float
    geometry: PyramidGeometry

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.gate, self.table, *self.kernels)


class Groups(NamedTuple):
    """Group g is task ``tasks[g]``, or ``first + g`` without ``tasks``."""

    tasks: Tensor | None
    first: int
    size: int

    @staticmethod
    def of(routing: Routing) -> Groups:
        tasks, count = routing.tasks, len(routing.table)
        if isinstance(tasks, Tensor):
            tasks = tasks.reshape(-1).to(torch.int64).contiguous()
            return Groups(tasks, 0, len(tasks))
        if tasks is None:
            return Groups(None, 0, count)
        if not 0 <= tasks < count:
            raise IndexError(f"task_ids holds {tasks}; allowed: 0 to {count - 1}")
        return Groups(None, tasks, 1)


class Folded(NamedTuple):
    """``folded [G, folded_size]``, ``active [G, S]``, and what the folder's ``fold_backward`` reads again."""

    folded: Tensor
    active: Tensor
    saved: tuple[Tensor | None, ...] = ()


#: Gradients of x, A, B and folded; None where they were not asked for.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Mark(Protocol):
    """What tells whether parameters are what they were."""

    def holds(self, routing: Routing) -> bool:
        """Whether the parameters, with the rows of the table that are asked for, are unchanged."""


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


class RoutingStamp(NamedTuple):
    """A ``Mark`` by versions, for GPUs: to compare values would wait for the device."""

    stamp: Stamp

    @staticmethod
    def of(routing: Routing, kept_table: Kept) -> RoutingStamp | None:
        """None where nothing can be kept: versions are unknown, or a graph is captured, which must fold at a replay."""
        stamp = None if captures(routing.gate) else Stamp.of(*routing.parameters)
        return None if stamp is None else RoutingStamp(stamp)

    def holds(self, routing: Routing) -> bool:
        return not captures(routing.gate) and self.stamp.holds(*routing.parameters)


def captures(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured. What it reads must follow from parameters at every replay."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Folder(Protocol):
    """A backend's router and fold in one native call; usually a module.

    Attributes:
        most_experts: of a layer that it takes; more are left to tensor operations.
    """

    most_experts: int

    def fold(self, routing: Routing, save: bool) -> Folded:
        """Route tasks and fold the kernels of their experts. Parameters are fp32, contiguous and on one device.

        A row in ``tasks`` that the table lacks is an IndexError where the host knows it, and NaN where it does not.
        """

    def fold_backward(
        self, routing: Routing, grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Gradients of ``routing.parameters``, each where ``needs`` asks. ``saved``: as ``fold`` gave it."""

    def mark(self, routing: Routing, kept_table: Kept) -> Mark | None:
        """What tells later whether the parameters are unchanged; None where nothing may be kept.

        Args:
            kept_table: of the table, for all layers that share it.
        """


class Backend(Protocol):
    """A backend: usually a module of ``backends``.

    Attributes:
        name: as ``EPT_BACKEND`` has it.
        fuses_dropout: whether ``Problem.seed`` may be given; for the others rows are dropped before they come.
        keeps: whether ``forward`` with ``save`` gives more than y.
        folder: routes tasks and folds kernels; None: tensor operations do.
    """

    name: str
    fuses_dropout: bool
    keeps: bool
    folder: Folder | None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve tensors of ``dtype`` on ``device``, or None."""

    def forward(self, problem: Problem, base: Base | None, save: bool = False, kept: Kept | None = None) -> Output:
        """The update of every row, ``sum_k B_k (A_k x) Kbar_k[g]^T``, and the base product where there is a base.

        Args:
            save: give what the backward may use again.
            kept: where inference keeps what follows from A, B and folded.
        """

    def backward(
        self, grad: Tensor, problem: Problem, weight: Tensor | None, needs: Sequence[bool], saved: Sequence[Tensor] = ()
    ) -> Gradients:
        """Gradients of x, A, B and folded from that of y, each where ``needs`` asks; x's includes the base product's.

        Args:
            saved: U, A_hat and B_hat of forward's ``Output``, or nothing.
        """

    def delta_weight(
        self, A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]
    ) -> Tensor:
        """The dense update of every group, ``[G, out, in]``."""

    def delta_weight_backward(
        self, grad: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of A, B and folded from that of the dense updates."""
