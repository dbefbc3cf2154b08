"""Tasks: what callers may pass as ``task_ids``, and what an adapter's layers share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .mixture import TaskMixture
from .prototypes import TaskPrototypes

#: What callers may pass: one id or name for the whole batch, one for every sample, a tensor of ids, or weights.
TaskIds = int | str | Sequence[int] | Sequence[str] | np.ndarray | Tensor | TaskMixture

#: What ``TaskSet.resolve`` gives: an id for the batch, ids int64 ``[N]`` (or ``[]``), or weights.
ResolvedTasks = int | Tensor | TaskMixture

#: In place of a name: a task for the model to find out from its input.
AUTO = "auto"


def wants_auto(task_ids: TaskIds | None) -> bool:
    """Whether ``task_ids`` is "auto", or "auto" for some sample."""
    if isinstance(task_ids, (list, tuple)):
        return any(isinstance(task, str) and task == AUTO for task in task_ids)
    return isinstance(task_ids, str) and task_ids == AUTO


def count_samples(tasks: ResolvedTasks) -> int | None:
    """How many samples resolved tasks are for; None for one task of a whole batch."""
    if isinstance(tasks, TaskMixture):
        tasks = tasks.weights
    return tasks.shape[0] if isinstance(tasks, Tensor) and tasks.dim() else None  # len() is fixed when exported


def flat_ids(task_ids: Any) -> tuple[Any, tuple[int, int] | None]:
    """Ids ``[batch, sequence]`` of tokens, a tensor, an array or lists of lists, in one dimension, and their shape.

    Whatever is not two-dimensional comes back as it is, with None.

    Raises:
        ValueError: lists of different lengths.
    """
    if isinstance(task_ids, (list, tuple)) and task_ids and all(isinstance(row, (list, tuple)) for row in task_ids):
        lengths = {len(row) for row in task_ids}
        if len(lengths) > 1:
            raise ValueError(
                f"task_ids of tokens must be [batch, sequence], got lists of the lengths {sorted(lengths)}"
            )
        return [task for row in task_ids for task in row], (len(task_ids), lengths.pop())
    if isinstance(task_ids, (np.ndarray, Tensor)) and task_ids.ndim == 2:
        batch, sequence = task_ids.shape
        return task_ids.reshape(-1), (batch, sequence)
    return task_ids, None


def _who_dropped_them() -> str:
    """In a call from a trainer of transformers: what keeps a column of the rows from the model, and what to write."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer: Any = frame.f_locals.get("self")
        if hasattr(trainer, "data_collator") and hasattr(trainer, "args"):
            removes = getattr(trainer.args, "remove_unused_columns", None)
            collator = getattr(trainer.data_collator, "__name__", type(trainer.data_collator).__name__)
            first = "by remove_unused_columns=True or " if removes else ""
            return (
                f". {type(trainer).__name__} has probably dropped the rows' column of tasks, {first}in its collator, "
                f"{collator}. Put ept.EPTTrainerMixin before the trainer "
                "(class Mine(ept.EPTTrainerMixin, ...)), or set remove_unused_columns=False and "
                "trainer.data_collator = ept.TaskCollator(trainer.data_collator)"
            )
        frame = frame.f_back
    return ""


class TaskSet(nn.Module):
    """The tasks of an adapter and, in subclasses, the parameters that all its layers share.

    An adapter has one, saved with it; its layers refer to it. A subclass with parameters or buffers sets all of them
    in ``reset_parameters``.

    Args:
        num_tasks: how many there are.
        names: optional distinct names, in the order of the ids.

    Attributes:
        routes: whether the method treats tasks differently; where False, ``task_ids`` are optional.
        prototypes: what ``task_ids="auto"`` decides by, or None without auto routing.
    """

    routes = True

    def __init__(self, num_tasks: int, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.names = tuple(names) if names is not None else None
        self.prototypes: TaskPrototypes | None = None

    @property
    def device(self) -> torch.device:
        """Where resolved ids go."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fresh initial values; nothing to do without parameters."""

    def begin_step(self) -> None:
        """An optimizer step of a trainer begins, which ``drop_step`` may leave out."""

    def drop_step(self) -> None:
        """Take back what the passes of the step under way set here themselves; gradients are the trainer's matter."""

    def part_sizes(self) -> dict[str, int]:
        """How many trained numbers it holds, by what they are."""
        return {}

    def resolve(self, task_ids: TaskIds | None) -> ResolvedTasks:
        """Validate ``task_ids``: an int or scalar tensor for the batch, int64 ``[N]`` or a mixture, on ``device``.

        Ids in a tensor are checked without a host synchronisation: at once on a CPU, by a device assertion on a GPU.

        Raises:
            ValueError: missing with more than one task, an id out of range, an unknown name, a tensor of another shape,
                "auto" (which a model's forward pass replaces by a mixture before it gets here).
            TypeError: neither an integer, a name, a sequence of these, nor an integer tensor.
        """
        if task_ids is None:
            if self.num_tasks == 1:
                return 0
            raise ValueError(
                f"task_ids is missing: this adapter has {self.num_tasks} tasks ({self._allowed()}){_who_dropped_them()}"
            )
        if isinstance(task_ids, np.ndarray):
            task_ids = torch.from_numpy(task_ids)
        if isinstance(task_ids, Tensor):
            return self._resolve_tensor(task_ids)
        if isinstance(task_ids, TaskMixture):
            return self._resolve_mixture(task_ids)
        if isinstance(task_ids, (Integral, str)):
            return self._resolve_one(task_ids)
        if isinstance(task_ids, Sequence):
            ids = [self._resolve_one(task) for task in task_ids]
            return torch.tensor(ids, dtype=torch.long, device=self.device)
        raise TypeError(
            "task_ids must be an integer, a name, a sequence of these or an integer tensor, "
            f"got {type(task_ids).__name__}"
        )

    def _allowed(self) -> str:
        names = f", or a name among {', '.join(self.names)}" if self.names else ""
        return f"allowed: 0 to {self.num_tasks - 1}{names}"

    def _resolve_one(self, task: object) -> int:
        if isinstance(task, str):
            if task == AUTO:
                raise ValueError(
                    "task_ids='auto' is for calls of a whole adapted model (forward, generate), whose input decides; "
                    f"here give a task ({self._allowed()})"
                )
            if self.names is None or task not in self.names:
                raise ValueError(f"task_ids names the unknown task {task!r}; {self._allowed()}")
            return self.names.index(task)
        if isinstance(task, bool) or not isinstance(task, Integral):
            raise TypeError(f"task_ids must hold integers or names, got {task!r}")
        task = int(task)
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task_ids holds {task}; {self._allowed()}")
        return task

    def _resolve_mixture(self, mixture: TaskMixture) -> TaskMixture:
        if mixture.weights.shape[1] != self.num_tasks:
            raise ValueError(f"task_ids mixes {mixture.weights.shape[1]} tasks, but there are {self.num_tasks}")
        return TaskMixture(mixture.weights.to(self.device))

    def _resolve_tensor(self, ids: Tensor) -> Tensor:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"task_ids must be an integer tensor, got {ids.dtype}")
        if ids.dim() > 1:
            raise ValueError(f"task_ids must be a scalar or 1-D tensor, got shape {list(ids.shape)}")
        if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(ids):
            raise ValueError("task_ids is what vmap runs over: map samples of one task, or call the model without vmap")
        if ids.is_meta:
            if self.device.type != "meta":
                raise ValueError(f"task_ids is on the meta device and holds no ids; the model is on {self.device}")
            return ids.to(device=self.device, dtype=torch.long)
        message = f"task_ids holds an id out of range; {self._allowed()}"
        in_range = ((ids >= 0) & (ids < self.num_tasks)).all()
        if torch.compiler.is_compiling():
            torch._assert_async(in_range, message)
        else:
            try:
                torch._assert_async(in_range, message)
            except RuntimeError as error:
                raise ValueError(f"{message}, got {ids.tolist()}") from error
        return ids.to(device=self.device, dtype=torch.long)


class TaskNames(TaskSet):
    """The tasks of a method that treats them all alike: ids are checked where given, and are optional."""

    routes = False
    _place: Tensor

    def __init__(
        self, num_tasks: int, names: Sequence[str] | None = None, *, device: torch.device | None = None
    ) -> None:
        super().__init__(num_tasks, names)
        self.register_buffer("_place", torch.empty(0, device=device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._place.device

    def resolve(self, task_ids: TaskIds | None) -> ResolvedTasks:
        """As ``TaskSet.resolve``; 0 where none are given."""
        return 0 if task_ids is None else super().resolve(task_ids)
