"""MoRE: every task chooses how much of one LoRA's rank it uses (arXiv 2505.22694)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapted_linear import AdaptedLinear
from ..config import ContrastiveConfig, TaskRoutedPeftType
from ..pyramid.router import route
from ..task_table import TaskRoutedAdapter
from ..tasks import TaskIds
from .low_rank import DiagonalAdapter

MORE = TaskRoutedPeftType("MORE")


@dataclass
class MoREConfig(ContrastiveConfig):
    """Configuration of MoRE; all arguments are those of ``ContrastiveConfig``. ``r`` is also the number of experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MORE


class MoREAdapter(TaskRoutedAdapter, DiagonalAdapter):
    """``y += (alpha / r) B diag(c) A dropout(x)`` with ``c_i = e / r`` for i <= e, else 0, for the task's rank e.

    Rank e is the best of r logits ``gate @ e_task``; its gradient is that of the full softmax (straight-through).
    **Choice**: the linear factor e / r once, as the paper says; the released code squares it and gives its gate no
    gradient.

    Attributes:
        A ``[r, in]``, B ``[out, r]``; gate ``[r, task_embedding_dim]``, Kaiming.
    """

    expert_kind = "rank"

    def __init__(
        self, *args: Any, device: torch.device | None = None, dtype: torch.dtype | None = None, **options: Any
    ):
        super().__init__(*args, device=device, dtype=dtype, **options)
        rank = self.geometry.rank
        self.expert_labels = tuple(range(1, rank + 1))
        self.gate = nn.Parameter(torch.empty(rank, self.task_table.dim, device=device, dtype=dtype))
        self.reset_adapter_parameters()

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        super().reset_adapter_parameters()
        nn.init.kaiming_uniform_(self.gate, a=math.sqrt(5))

    def route(self, task_ids: TaskIds | None = None) -> tuple[Tensor, Tensor]:
        """Rank of each given task, counted from 0, and its weight: ``([G, 1], [G, 1])``, as ``EPTLinear.route``."""
        return route(self.gate, self.task_table.embed(self.task_table.resolve(task_ids)).to(self.gate.device), 1)

    def core(self, tasks: int | Tensor) -> Tensor:
        dtype = torch.promote_types(self.gate.dtype, torch.float32)
        embeddings = self.task_table.embed(tasks).to(self.gate.device, dtype)
        probabilities = (embeddings @ self.gate.to(dtype).T).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.argmax(1, keepdim=True), 1.0)
        ranks = torch.arange(1, self.geometry.rank + 1, device=chosen.device, dtype=dtype)
        cores = torch.tril(ranks[:, None].expand(-1, len(ranks))) / self.geometry.rank  # [e, i]: e / r for i <= e
        return (chosen + (probabilities - probabilities.detach())) @ cores

    def part_sizes(self) -> dict[str, int]:
        return {"factors": self.A.numel() + self.B.numel(), "gates": self.gate.numel()}


class MoRELinear(AdaptedLinear, MoREAdapter):
    """A frozen linear map and its MoRE adapter."""
