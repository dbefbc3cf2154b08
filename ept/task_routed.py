"""``TaskRoutedAdapter``: routing by learned task embeddings with a contrastive loss, as EPT and MoRE have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .context import TaskContext
from .contrastive_config import ContrastiveConfig
from .layer_adapter import LayerAdapter, WeightedLosses
from .losses import contrastive_task_loss
from .tasks import TaskTable
from .widths import commonest_width


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
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> TaskTable:
        return TaskTable(
            config.num_tasks,
            config.task_embedding_dim or commonest_width(features),
            config.task_names,
            similarity=config.task_similarity,
            finished=getattr(config, "finished_tasks", 0),
            device=device,
            dtype=dtype,
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
