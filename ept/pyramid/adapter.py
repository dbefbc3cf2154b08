"""``PyramidAdapter``: the trainable part of one layer (seed, kernels, gate) and the kernels that a task makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_kernels import (
    Kept,
    PyramidGeometry,
    fold_kept,
    fold_tasks,
    pyramid_delta,
    pyramid_linear,
    pyramid_merge,
    pyramid_weight,
)
from ept_kernels.functional import LayerKept, routed_linear
from ept_kernels.problem import Base, Routing
from ept_kernels.tracing import is_exporting

from ..config import EPTConfig
from ..mixture import TaskMixture
from ..task_table import GrowingModule, TaskRoutedAdapter, growing
from ..tasks import ResolvedTasks, TaskIds, TaskNames, TaskSet
from .router import UNMERGEABLE, fold_routed, fold_tokens, route, route_rows, route_stages, rows_of

#: By how much the new task's logit falls from one new expert to the next, so that their order is certain.
_STEP_BETWEEN_NEW_EXPERTS = 1e-3


class PyramidAdapter(GrowingModule, TaskRoutedAdapter):
    """Parameters of Expert Pyramid Tuning for one linear map, without the map (spec section 1).

    Args:
        in_features, out_features: sizes of the map.
        config: the adapter's hyperparameters.
        shared: the task embeddings, shared by all layers of a model. Referenced, not registered: its owner saves it.
            With ``routing="token"`` ``TaskNames``: there are no embeddings.
        name: the map's name in its model.

    Attributes:
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``, the factors of the seed.
        kernels: one ``[k_e, k_e]`` per expert, zero at first: the layer starts as an exact no-op.
        gate: ``[E, task_embedding_dim]``, or ``[E, in]`` with ``routing="token"``.

    Raises:
        ValueError: a scale larger than the map, task embeddings where tokens route.
    """

    expert_kind = "kernel size"
    grows = ("gate",)
    gate = growing("gate")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: EPTConfig,
        shared: TaskSet,
        *,
        name: str = "",
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, config, shared, name=name)
        sizes = config.all_kernel_sizes
        self._stages = [
            (first, PyramidGeometry(in_features, out_features, config.r, sizes[:experts], config.alp_scaling))
            for first, experts in config.stages
        ]
        self.check_scales(sizes)
        self.geometry = self._stages[-1][1]
        self.scaling = config.lora_alpha / config.r
        self.top_k = config.top_k
        self.init_seed = config.init_seed
        self.by_token = config.routing == "token"
        if self.by_token and shared.routes:
            raise ValueError("task_table must be left out with routing='token', which has no task embeddings")
        self.unmergeable = UNMERGEABLE if self.by_token else None
        self.A = nn.Parameter(torch.empty(config.r, self.geometry.seed_width, **factory))
        self.B = nn.Parameter(torch.empty(self.geometry.seed_height, config.r, **factory))
        self.kernels = nn.ParameterList(nn.Parameter(torch.empty(k, k, **factory)) for k in sizes)
        width: Any = in_features if self.by_token else shared.dim
        self.gate = nn.Parameter(torch.empty(self.geometry.num_experts, width, **factory))
        self.kept, self.kept_factors = Kept(), Kept()
        self.reset_adapter_parameters()
        if config.finished_tasks:
            experts = self._known_to(config.finished_tasks).num_experts
            if experts < self.geometry.num_experts:
                self.split_rows("gate", experts)
            self.finish(config.finished_tasks)

    @property
    def expert_labels(self) -> tuple[int, ...] | None:
        return None if self.by_token else self.geometry.kernel_sizes

    def _known_to(self, tasks: int) -> PyramidGeometry:
        """The layer with the experts alone that the first ``tasks`` tasks know of."""
        return [geometry for first, geometry in self._stages if first < tasks][-1]

    def finish(self, tasks: int) -> None:
        """Freeze what the first ``tasks`` tasks use: a later one has its embedding, and experts that came with it."""
        experts = self._known_to(tasks).num_experts
        gate = self.row_parameters("gate")
        if experts < self.geometry.num_experts:
            gate.pop()
        for parameter in (self.A, self.B, *gate, *self.kernels[:experts]):
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer that was made before would apply it

    def check_scales(self, sizes: Sequence[int]) -> None:
        """Raise ValueError if an expert of one of these sizes could not be added."""
        missing = sorted(set(sizes) - set(self._stages[0][1].scales))
        if missing:
            raise ValueError(
                f"added experts must be of the layer's scales {self._stages[0][1].scales}, for which its seed is cut; "
                f"{missing} are not"
            )

    @torch.no_grad()
    def add_experts(self, task: int, sizes: tuple[int, ...]) -> None:
        """Add experts for ``task``, the newest, and tasks to come; freeze all earlier ones.

        Their kernels are zero. Their gate rows are close to that of the task's best expert: ``top_k - 1`` of them (at
        least one) have slightly larger logits, the others slightly smaller ones. So the task begins with these and, if
        ``top_k`` allows, with its best earlier expert.

        Args:
            sizes: kernel sizes.

        Raises:
            ValueError: a size that is not among the layer's scales, for which the seed is cut.
        """
        self.check_scales(sizes)
        embedding = self.task_table.weight[task].to(self.A.device)
        best = self.gate[(self.gate @ embedding).argmax()]
        step = _STEP_BETWEEN_NEW_EXPERTS * embedding / embedding.square().sum()
        first = max(1, self.top_k - 1)
        steps = [first - place if place < first else first - 1 - place for place in range(len(sizes))]
        self.append_rows("gate", torch.stack([best + count * step for count in steps]))
        self.kernels.extend(nn.Parameter(self.A.new_zeros(k, k)) for k in sizes)
        old = self.geometry
        self.geometry = PyramidGeometry(
            self.in_features, self.out_features, old.rank, old.kernel_sizes + sizes, old.alp_scaling
        )
        self._stages.append((task, self.geometry))
        self.finish(task)

    @classmethod
    def check_features(cls, config: EPTConfig, in_features: int, out_features: int) -> None:
        PyramidGeometry(in_features, out_features, config.r, config.kernel_sizes)

    @classmethod
    def make_shared(cls, config: EPTConfig, features: Mapping[str, tuple[int, int]], **factory: Any) -> TaskSet:
        if config.routing == "token":
            return TaskNames(config.num_tasks, config.task_names, device=factory.get("device"))
        return super().make_shared(config, features, **factory)

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Gaussian seed of variance 1/in and 1/out (docs/recipe.md), zero kernels, Kaiming gate.

        With ``init_seed="zero"`` B is zero and the kernels are Gaussian, of variance 1/k. The layer is a no-op at first
        either way; if both were zero, neither would ever get a gradient.
        """
        zero_seed = self.init_seed == "zero"
        nn.init.normal_(self.A, std=self.geometry.in_features**-0.5)
        nn.init.normal_(self.B, std=0.0 if zero_seed else self.geometry.out_features**-0.5)
        for kernel in self.kernels:
            nn.init.normal_(kernel, std=kernel.shape[0] ** -0.5 if zero_seed else 0.0)
        gate = torch.empty_like(self.gate)
        nn.init.kaiming_uniform_(gate, a=math.sqrt(5))
        self.fill_rows("gate", gate)

    def route(self, task_ids: TaskIds | None = None) -> tuple[Tensor, Tensor]:
        """Experts and weights of each given task: ``(expert_index [G, top_k], gates [G, top_k])``.

        Raises:
            ValueError, TypeError: as ``TaskTable.resolve``, or ``routing="token"``.
        """
        if self.by_token:
            raise ValueError("routing='token' gives experts to tokens, not to tasks; route_tokens(x) says to which")
        tasks = self.task_table.resolve(task_ids)
        embeddings = self.task_table.embed(tasks).to(self.A.device)
        if len(self._stages) == 1:
            return route(self.gate, embeddings, self.top_k)
        ids = torch.as_tensor(tasks, device=embeddings.device).reshape(-1)
        stages = [(first, geometry.num_experts) for first, geometry in self._stages]
        return route_stages(self.gate, embeddings, ids, self.top_k, stages)

    def route_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights of every row of x ``[..., in]``: ``(expert_index [..., top_k], gates [..., top_k])``.

        Raises:
            ValueError: x of another width, or ``routing="task"``.
        """
        if not self.by_token:
            raise ValueError("routing='task' gives experts to tasks, not to tokens; route(task_ids) says to which")
        index, gates = route_rows(self.gate, rows_of(x, self.in_features), self.top_k)
        return index.view(*x.shape[:-1], self.top_k), gates.view(*x.shape[:-1], self.top_k)

    def _kernels(self) -> tuple[Tensor, ...]:
        own = self.kernels._parameters  # a ParameterList looks every item up by name, which is slow for a small layer
        found: Any = own.values() if len(own) == self.geometry.num_experts else self.kernels
        return tuple(found)

    def fold(self, tasks: ResolvedTasks) -> tuple[Tensor, Tensor | None, Tensor]:
        """Folded kernels ``[G, folded_size]`` of resolved tasks, ``groups`` and ``active`` as the ops take them.

        A batch with more samples than tasks routes every task once; a smaller one routes its samples. A mixture routes
        every task once and mixes what comes of it. In inference (evaluation mode, no gradients) all tasks are folded
        once and kept until a parameter changes (``fold_kept``).

        Raises:
            ValueError: ``routing="token"``.
        """
        self.check_mergeable()
        if isinstance(tasks, TaskMixture):
            folded, _, active = self.fold(tasks.every_task())
            return tasks.mix(folded), torch.arange(len(tasks), device=folded.device), tasks.mix_any(active)
        table, device = self.task_table, self.A.device
        weight = table.weight
        elsewhere = weight.device != device  # a base on several devices: the table is on one of them
        if elsewhere:
            weight = weight.to(device)
            tasks = tasks.to(device) if isinstance(tasks, Tensor) else tasks
        if len(self._stages) > 1:
            return self._fold_stages(weight, tasks)
        groups: Tensor | None = None
        routed: int | Tensor | None = tasks
        if not (self.training or elsewhere):
            plan = (self._kernels(), self.top_k, self.scaling, self.geometry)
            kept = fold_kept(self.kept, table.kept, self.gate, weight, tasks, *plan)
            if kept is not None:
                return kept
        if isinstance(tasks, Tensor) and tasks.dim():
            if elsewhere or is_exporting() or len(tasks) > table.num_tasks:
                groups, routed = tasks, None
            elif len(tasks) != 1:
                groups = torch.arange(len(tasks), device=device)
        folded, active = self._fold_rows(weight, routed, self.geometry)
        return folded, groups, active

    def _fold_stages(self, weight: Tensor, tasks: int | Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """``fold`` with experts that some tasks do not know: the tasks of every stage for themselves, in one piece.

        Masking the others' logits would be shorter, but a sum over more experts is rounded differently.
        """
        stages = self._stages
        if isinstance(tasks, int):
            folded, active = self._fold_rows(weight, tasks, self._known_to(tasks + 1))
            return folded, None, active
        ends = [*(first for first, _ in stages[1:]), len(weight)]
        parts = [
            self._fold_rows(weight[first:end], None, known) for (first, known), end in zip(stages, ends, strict=True)
        ]
        folded, active = (torch.cat(part) for part in zip(*parts, strict=True))
        return (folded, tasks, active) if tasks.dim() else (folded[tasks][None], None, active[tasks][None])

    def _fold_rows(self, table: Tensor, rows: int | Tensor | None, geometry: PyramidGeometry) -> tuple[Tensor, Tensor]:
        """``(folded, active)`` of rows (None: all) of embeddings, with the first experts, which ``geometry`` has."""
        gate, kernels = self.gate, self._kernels()
        if geometry is not self.geometry:
            gate, kernels = gate[: geometry.num_experts], kernels[: geometry.num_experts]
        fused = fold_tasks(gate, table, rows, kernels, self.top_k, self.scaling, geometry)
        if fused is not None:
            return fused
        if rows is not None:
            table = table[rows : rows + 1] if isinstance(rows, int) else F.embedding(rows.reshape(-1), table)
        return fold_routed(kernels, *route(gate, table, self.top_k), self.scaling, geometry)

    def fold_for(self, x: Tensor, task_ids: TaskIds | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """``fold`` of the tasks of a call with x ``[..., in]``, or with ``routing="token"`` of its rows."""
        if not self.by_token:
            return self.fold(self.tasks_for(x, task_ids))
        if task_ids is not None:  # they change nothing, but are checked
            self.tasks_for(x, task_ids)
        return fold_tokens(x, self.gate, self._kernels(), self.top_k, self.scaling, self.geometry)

    def delta_weight(self, task: int | str | None = None) -> Tensor:
        """The dense update of one task, ``[out, in]`` in the adapter's dtype; differentiable.

        Raises:
            ValueError, TypeError: unknown task, or none with more than one task; ``routing="token"``.
        """
        folded, *_ = self.fold(self.resolve_one(task))
        return pyramid_weight(self.A, self.B, folded, self.geometry)[0]

    def delta(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        return self._run(x, None, task_ids)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: TaskIds | None = None) -> Tensor:
        return self._run(x, Base(weight, bias), task_ids)

    def _run(self, x: Tensor, base: Base | None, task_ids: TaskIds | None) -> Tensor:
        """``routed_linear`` where it takes the call, else the fold and then the op."""
        A, B, dropout_p, kept = self.A, self.B, self.dropout_p, self._kept_for_inference()
        if self.by_token or len(self._stages) > 1:
            folded, groups, active = self.fold_for(x, task_ids)
        else:
            tasks = self.tasks_for(x, task_ids)
            if not isinstance(tasks, TaskMixture):
                plan = (self._kernels(), self.top_k, self.scaling, self.geometry)
                routing = Routing(self.gate, self.task_table.weight, tasks, *plan)
                layer_kept = None if kept is None else LayerKept(self.kept, self.task_table.kept, kept)
                output = routed_linear(x, base, (A, B), routing, dropout_p, layer_kept)
                if output is not None:
                    return output
            folded, groups, active = self.fold(tasks)
        options: Any = {"dropout_p": dropout_p, "active": active, "kept": kept}
        if base is None:
            return pyramid_delta(x, A, B, folded, groups, self.geometry, **options)
        return pyramid_linear(x, *base, A, B, folded, groups, self.geometry, **options)

    def _kept_for_inference(self) -> Kept | None:
        """Where an op may keep what follows from parameters; training empties it and the folded kernels.

        A tensor's version does not count writes through ``parameter.data``, which some optimizers make; emptying in
        training covers these.
        """
        if not self.training:
            return self.kept_factors
        if not torch.compiler.is_compiling() and (self.kept.value or self.kept_factors.value) is not None:
            self.kept.value = self.kept_factors.value = None
        return None

    def merge_into(self, weight: Tensor, task: int) -> Tensor:
        folded, *_ = self.fold(task)
        return pyramid_merge(weight, self.A, self.B, folded, self.geometry)[0]

    def part_sizes(self) -> dict[str, int]:
        return {
            "seed": self.A.numel() + self.B.numel(),
            "kernels": sum(kernel.numel() for kernel in self.kernels),
            "gates": self.gate.numel(),
        }
