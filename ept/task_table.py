"""What methods with task embeddings share: the table, which may grow, and its contrastive loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_kernels import Kept, without_autocast

from .config import ContrastiveConfig
from .context import TaskContext
from .layer_adapter import LayerAdapter, WeightedLosses
from .mixture import TaskMixture
from .tasks import ResolvedTasks, TaskSet


def _stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of ``module``, or the plain tensor that FSDP puts in its place during a pass."""
    parameter = module._parameters.get(name)
    return module.__dict__.get(name) if parameter is None else parameter


def growing(name: str) -> property:
    """The property that a class has for a parameter that may grow; it is set and deleted as any parameter."""

    def rows(module: nn.Module) -> Tensor:
        kept, added = _stored(module, name), _stored(module, f"{name}_added")
        if kept is None:
            raise AttributeError(name)
        return kept if added is None else torch.cat([kept, added])

    def store(module: nn.Module, value: Tensor) -> None:
        module.__dict__[name] = value

    def remove(module: nn.Module) -> None:
        del module.__dict__[name]

    return property(rows, store, remove, f"All rows of ``{name}``; a parameter only while none have been added.")


class GrowingModule(nn.Module):
    """A module with parameters that may grow by rows, declared by ``growing``; a subclass names them in ``grows``.

    Earlier rows stay bit-identical. An optimizer moves a whole tensor: weight decay and momentum change even rows
    without a gradient. So the finished rows and the new ones are two parameters, ``name`` and ``name_added``. Reading
    ``module.name`` gives both in one tensor, and a state dict holds them as one, under ``name``.
    """

    grows: ClassVar[tuple[str, ...]] = ()

    def row_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that hold the rows of ``name``: one, or the finished one and the added one."""
        parts = (self._parameters[name], self._parameters.get(f"{name}_added"))
        return [part for part in parts if part is not None]

    @torch.no_grad()
    def split_rows(self, name: str, finished: int) -> None:
        """Freeze the first ``finished`` rows of ``name``; the others, if any, are ``name_added``."""
        rows = getattr(self, name).detach()
        self._parameters[name] = nn.Parameter(rows[:finished].clone(), requires_grad=False)
        added = nn.Parameter(rows[finished:].clone()) if len(rows) > finished else None
        self.register_parameter(f"{name}_added", added)

    @torch.no_grad()
    def append_rows(self, name: str, rows: Tensor) -> None:
        """Freeze all rows of ``name`` that there are and add trainable ones."""
        before = getattr(self, name).detach()
        self.register_parameter(f"{name}_added", None)  # rows added earlier are in ``before``
        self._parameters[name] = nn.Parameter(torch.cat([before, rows.to(before)]), requires_grad=False)
        self.split_rows(name, len(before))

    @torch.no_grad()
    def fill_rows(self, name: str, rows: Tensor) -> None:
        """Set every row of ``name``."""
        parts = self.row_parameters(name)
        for part, own in zip(parts, rows.split([len(part) for part in parts]), strict=True):
            part.copy_(own)

    def requires_grad_(self, requires_grad: bool = True) -> GrowingModule:
        """As in ``nn.Module``, but finished rows never require a gradient."""
        super().requires_grad_(requires_grad)
        self.freeze_finished_rows()
        return self

    def freeze_finished_rows(self) -> None:
        """Freeze rows that others have been added to."""
        for name in self.grows:
            finished, added = self._parameters.get(name), self._parameters.get(f"{name}_added")
            if finished is not None and added is not None:
                finished.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.grows:
            added = destination.pop(f"{prefix}{name}_added", None)
            if added is not None:
                destination[f"{prefix}{name}"] = torch.cat([destination[f"{prefix}{name}"], added])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.grows:
            parts, rows = self.row_parameters(name), state_dict.get(f"{prefix}{name}")
            if len(parts) > 1 and rows is not None and len(rows) == sum(map(len, parts)):
                state_dict = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
                finished, added = rows.split([len(part) for part in parts])
                state_dict |= {f"{prefix}{name}": finished, f"{prefix}{name}_added": added}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def commonest_width(features: Mapping[str, tuple[int, int]]) -> int:
    """The commonest input width among ``(in, out)`` of the targets; the smaller one where two are equally common."""
    widths = Counter(width for width, _ in features.values())
    return min(widths, key=lambda width: (-widths[width], width))


class TaskTable(GrowingModule, TaskSet):
    """One learned vector per task, shared by every layer of an adapter (spec section 3).

    Args:
        num_tasks: rows T.
        dim: width of an embedding.
        names: optional T distinct names.
        similarity: expected cosine of two embeddings at the start, in [0, 1).
        finished: the first so many tasks' embeddings never train.
    """

    grows = ("weight",)
    weight = growing("weight")

    def __init__(
        self,
        num_tasks: int,
        dim: int,
        names: Sequence[str] | None = None,
        *,
        similarity: float = 0.0,
        finished: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_tasks, names)
        self.dim, self.similarity = dim, similarity
        self.weight = nn.Parameter(torch.empty(num_tasks, dim, device=device, dtype=dtype))
        self.kept = Kept()
        if finished:
            self.split_rows("weight", finished)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Standard normal entries; rows share a part of variance ``similarity`` (docs/recipe.md)."""
        rows = torch.randn_like(self.weight)
        if self.similarity > 0:
            shared = torch.randn_like(rows[0])
            rows.mul_((1 - self.similarity) ** 0.5).add_(shared, alpha=self.similarity**0.5)
        self.fill_rows("weight", rows)

    @torch.no_grad()
    def add_task(self, name: str | None, like: int | None = None) -> int:
        """Append an embedding, the mean of all or that of the task ``like``, and freeze the others; gives its id."""
        weight = self.weight.detach()
        self.append_rows("weight", weight.mean(0, keepdim=True) if like is None else weight[like : like + 1])
        self.num_tasks += 1
        if self.names is not None:
            self.names = (*self.names, str(name))
        if self.prototypes is not None:
            self.prototypes.add_task()
        return self.num_tasks - 1

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, dim={self.dim}, names={self.names}"

    def embed(self, tasks: ResolvedTasks) -> Tensor:
        """Embeddings of resolved ids: ``[1, d]`` for one id, ``[N, d]`` for ``[N]``.

        Raises:
            TypeError: a mixture: what it mixes are folded kernels, and no embedding stands for those.
        """
        if isinstance(tasks, TaskMixture):
            raise TypeError("task_ids must be ids or names, got a TaskMixture, which has no embedding of its own")
        if isinstance(tasks, int):
            return self.weight[tasks : tasks + 1]
        return F.embedding(tasks.reshape(-1), self.weight)

    def part_sizes(self) -> dict[str, int]:
        return {"task embeddings": self.weight.numel()}


def contrastive_task_loss(
    pooled: Sequence[Tensor],
    tasks: ResolvedTasks,
    table: TaskTable,
    temperature: float,
    targets: Sequence[Tensor | None] = (),
) -> Tensor:
    """``CE(cos(z, e_.) / temperature, task)``, averaged over samples and over the layers that were pooled.

    Args:
        pooled: representations ``[batch, d]``, one per layer.
        tasks: resolved ids, an int for the batch or ``[batch]``, or a mixture.
        table: embeddings ``[T, d]``.
        temperature: of the cosine similarities.
        targets: the task of every representation of each layer, ``[batch]``, where ``tasks`` do not say it (packed
            samples); -100 is left out.

    Returns:
        A scalar in at least fp32; 0, still attached to the table, where nothing was pooled, the batch is empty,
        or the tasks are a mixture: a guess is no label.
    """
    dtype = torch.promote_types(table.weight.dtype, torch.float32)
    if isinstance(tasks, TaskMixture) or not any(len(rows) for rows in pooled):
        return table.weight[:0].sum(dtype=dtype)
    representations = torch.cat([rows.to(table.weight.device, dtype) for rows in pooled])  # [samples of all layers, d]
    with without_autocast(representations.device):
        logits = _unit(representations) @ _unit(table.weight.to(dtype)).T / temperature
        own = targets or [None] * len(pooled)
        wanted = [
            _targets(len(rows), tasks, logits.device) if target is None else target.to(logits.device)
            for rows, target in zip(pooled, own, strict=True)
        ]
        return F.cross_entropy(logits, torch.cat(wanted))


def _unit(rows: Tensor) -> Tensor:
    """Each row over its norm; zeros stay. First over its largest entry: squares of 1e20 leave the range of fp32."""
    largest = rows.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return F.normalize(rows / largest, dim=-1)


def _targets(rows: int, tasks: int | Tensor, device: torch.device) -> Tensor:
    """The task of each of a layer's rows; windows or beams of a sample are consecutive and share its task."""
    if isinstance(tasks, int):
        return torch.full((rows,), tasks, device=device)
    tasks = tasks.reshape(-1)
    return tasks.repeat_interleave(rows // len(tasks))


class TaskRoutedAdapter(LayerAdapter):
    """A ``LayerAdapter`` whose layers share a ``TaskTable`` of embeddings."""

    @property
    def task_table(self) -> TaskTable:
        return self.shared

    @classmethod
    def make_shared(
        cls,
        config: ContrastiveConfig,
        features: Mapping[str, tuple[int, int]],
        **factory: Any,
    ) -> TaskTable:
        return TaskTable(
            config.num_tasks,
            config.task_embedding_dim or commonest_width(features),
            config.task_names,
            similarity=config.task_similarity,
            finished=getattr(config, "finished_tasks", 0),
            **factory,
        )

    def collect(self, context: TaskContext, x: Tensor) -> None:
        context.collect(x, self.task_table.dim, context.layout if context.layout is not None else self.row_place.layout)

    @classmethod
    def collects(cls, config: ContrastiveConfig) -> tuple[bool, bool]:
        return config.contrastive_weight > 0, False

    @classmethod
    def losses(
        cls,
        config: ContrastiveConfig,
        shared: TaskTable,
        adapters: Mapping[str, LayerAdapter],
        context: TaskContext | None,
    ) -> WeightedLosses:
        if config.contrastive_weight == 0:
            return {}
        if config.num_tasks == 1:
            return {"contrastive_loss": (config.contrastive_weight, shared.weight.new_zeros(()))}
        if context is None:
            raise ValueError("model has no training forward yet: call it in training mode, then ept.contrastive_loss")
        tasks: Any = context.task_ids  # a model's context holds resolved ones
        loss = contrastive_task_loss(context.pooled or [], tasks, shared, config.temperature, context.targets)
        return {"contrastive_loss": (config.contrastive_weight, loss)}
