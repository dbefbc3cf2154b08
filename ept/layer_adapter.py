"""``LayerAdapter``: what a method adds to one linear map. Layers, tuner and trainer know methods only by this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AdapterConfig
from .context import TaskContext, current, fit
from .mixture import TaskMixture
from .rows import PLAIN, Place
from .tasks import ResolvedTasks, TaskIds, TaskNames, TaskSet, count_samples

#: A method's additional losses by name, each with the weight that it has in the total: ``{name: (weight, value)}``.
WeightedLosses = dict[str, tuple[float, Tensor]]


def add_rounded_once(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight + delta``, both ``[out, in]``, added in at least fp32; in the dtype of ``weight``."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), delta.dtype)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


class LayerAdapter(nn.Module):
    """The trainable part of one adapted linear map, without the map.

    A subclass initialises all its parameters and buffers in ``reset_adapter_parameters``. It defines ``delta`` (an
    update that is added to the map's output) or ``around`` (any other), ``delta_weight`` if it merges, and ``linear``
    where one op computes map and update together.

    Args:
        in_features, out_features: sizes of the map.
        config: the method's hyperparameters.
        shared: the adapter's tasks and what all its layers share. Referenced, not registered: its owner saves it.
        name: the map's name in its model, by which ``shared`` may tell layers apart.

    Attributes:
        unmergeable: why no task's update can be put into the weight, or None where it can.
        stacks: whether several adapters of the method may be active at once.
        expert_labels: what each expert of ``route`` is, for reports: kernel sizes, ranks or numbers; None without one.
        expert_kind: what these labels are.
        row_place: how rows run where the map stands.
    """

    unmergeable: str | None = None
    stacks: ClassVar[bool] = True
    expert_labels: tuple[int, ...] | None = None
    expert_kind: ClassVar[str] = "expert"
    row_place: Place = PLAIN

    def __init__(
        self, in_features: int, out_features: int, config: AdapterConfig, shared: TaskSet, *, name: str = ""
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.layer_name = in_features, out_features, name
        self.dropout = nn.Dropout(config.lora_dropout)
        self._shared = (shared,)

    @property
    def shared(self) -> Any:
        """What ``make_shared`` made: a ``TaskSet`` of the method's own kind."""
        return self._shared[0]

    @classmethod
    def make_shared(
        cls,
        config: AdapterConfig,
        features: Mapping[str, tuple[int, int]],
        **factory: Any,
    ) -> TaskSet:
        """The tasks, and what all layers of an adapter share.

        Args:
            features: ``(in_features, out_features)`` of every layer that will be adapted, by name.
            factory: device and dtype of parameters.

        Raises:
            ValueError: layers that the method cannot adapt together.
        """
        return TaskNames(config.num_tasks, config.task_names, device=factory.get("device"))

    @classmethod
    def check_features(cls, config: AdapterConfig, in_features: int, out_features: int) -> None:
        """Raise ValueError if ``config`` does not fit a map of these sizes."""

    @property
    def dropout_p(self) -> float:
        """Probability with which this call drops an entry of the adapter's input: 0 outside training."""
        return self.dropout.p if self.training else 0.0

    def reset_adapter_parameters(self) -> None:
        """Fresh initial values of everything here."""
        raise NotImplementedError

    def delta(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """What is added to the map's output for x ``[..., in]``: ``[..., out]`` in the dtype of x."""
        raise NotImplementedError

    def around(self, base: Callable[[Tensor], Tensor], x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """The adapted map, for any ``base`` that maps ``[..., in]`` to ``[..., out]``."""
        output = base(x)
        return output + self.delta(x.to(output.dtype), task_ids)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: TaskIds | None = None) -> Tensor:
        """The adapted map, for a dense frozen ``weight [out, in]`` and ``bias [out]`` or None."""
        return self.around(lambda rows: F.linear(rows, weight, bias), x, task_ids)

    def delta_weight(self, task: int | str | None = None) -> Tensor:
        """The dense update of one task, ``[out, in]`` in the adapter's dtype; differentiable.

        Raises:
            ValueError, TypeError: unknown task, or none where there are several; a method that does not merge.
        """
        raise ValueError(self.unmergeable)

    def check_mergeable(self) -> None:
        """Raise ValueError where no task's update can be put into the weight."""
        if self.unmergeable is not None:
            raise ValueError(self.unmergeable)

    def merge_into(self, weight: Tensor, task: int) -> Tensor:
        """``weight [out, in]`` with one task's update, added in at least fp32 and rounded once; ``weight`` is kept."""
        return add_rounded_once(weight, self.delta_weight(task))

    @classmethod
    def check_shardable(cls, shared: TaskSet) -> None:
        """Raise ValueError where something must happen before processes shard the parameters among them (FSDP)."""

    def resolve_one(self, task: int | str | None) -> int | Tensor:
        """The id of one task.

        Raises:
            ValueError, TypeError: an unknown task, or several.
        """
        if task is not None and not isinstance(task, (int, str)):
            raise TypeError(f"task must be an id or a name, got {type(task).__name__}")
        resolved = self.shared.resolve(task)
        if isinstance(resolved, TaskMixture):  # nothing in task is one
            raise TypeError(f"task must be an id or a name, got {task!r}")
        return resolved

    def tasks_for(self, x: Tensor, task_ids: TaskIds | None) -> ResolvedTasks:
        """Resolved tasks of a call: the argument, else the current context's, checked against the batch of x.

        Raises:
            ValueError, TypeError: as ``TaskSet.resolve``, or a number of ids that does not fit the batch.
        """
        shared = self.shared
        if task_ids is not None:
            return self._explicit_tasks(x, task_ids)
        context = current() if shared.num_tasks > 1 else None
        if context is None:
            return shared.resolve(None)
        self.collect(context, x)
        given: Any = context.task_ids
        tables = context.tables
        known = tables[0] is shared if len(tables) == 1 else any(other is shared for other in tables)
        tasks: Any = given if known else shared.resolve(given)
        count = count_samples(tasks)
        if count is None:
            return tasks
        place = self.row_place
        if place.plain and x.dim() > 2 and x.shape[0] == count and context.layout is None and context.shape is None:
            return tasks
        fitted = fit(tasks, count, x, context, place, self.layer_name)
        if not (place.known or torch.compiler.is_compiling()):
            self._learn(x, count, context, first=fitted is tasks)
        return fitted

    def _learn(self, x: Tensor, count: int, context: TaskContext, *, first: bool) -> None:
        """Trust from now on that a dimension is the batch, the first or else that of its layout, if x shows it."""
        place, dim = self.row_place, 0 if first else 1
        if x.dim() < 2 or x.shape[dim] != count or context.layout is not None or not (first or place.guessed):
            return
        found = context.shown(x, dim)
        if found[1] if found is not None else x.dim() > 2 and x.shape[0] != x.shape[1]:
            self.row_place = replace(place, known=True, guessed=False, layout=None if first else place.layout)

    def _explicit_tasks(self, x: Tensor, task_ids: TaskIds) -> ResolvedTasks:
        """The tasks of a call that names them: one for all, or one for each sample, which are the first dimension."""
        tasks = self.shared.resolve(task_ids)
        samples = count_samples(tasks)
        batch = x.shape[0] if x.dim() > 1 else 1
        if samples not in (None, batch):
            raise ValueError(
                f"task_ids must hold one id for each of the {batch} samples of x {list(x.shape)}, got {samples}"
            )
        return tasks

    def collect(self, context: TaskContext, x: Tensor) -> None:
        """Leave in ``context`` what the method's loss needs of an input."""

    @classmethod
    def collects(cls, config: AdapterConfig) -> tuple[bool, bool]:
        """Whether a training forward pass collects ``context.pooled`` and ``context.terms``."""
        return False, False

    @classmethod
    def losses(
        cls,
        config: AdapterConfig,
        shared: TaskSet,
        adapters: Mapping[str, LayerAdapter],
        context: TaskContext | None,
    ) -> WeightedLosses:
        """The method's own losses after a training forward pass, which ``context`` holds; see ``ept.auxiliary_loss``.

        Raises:
            ValueError: there has been no such pass, and the loss needs one.
        """
        return {}

    def part_sizes(self) -> dict[str, int]:
        """How many trained numbers there are, by what they are."""
        raise NotImplementedError
