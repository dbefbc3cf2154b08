"""MOELoRA: the task weights N small LoRA experts, by one gate for the whole model (arXiv 2310.18339)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapted_linear import AdaptedLinear
from ..config import AdapterConfig, TaskRoutedPeftType, check, check_size
from ..tasks import TaskIds, TaskSet
from .low_rank import DiagonalAdapter

MOELORA = TaskRoutedPeftType("MOELORA")
_STD = 0.01  # of the experts' A at the start


@dataclass
class MOELoRAConfig(AdapterConfig):
    """Configuration of MOELoRA; the defaults are the paper's.

    Args (beyond those of ``AdapterConfig``):
        r: rank of all experts together, a multiple of ``num_experts``.
        num_experts: N, each of rank ``r / N``.
        task_embedding_dim: width of the gate's task embeddings.
    """

    r: int = 16
    num_experts: int = 8
    task_embedding_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOELORA
        for name in ("num_experts", "task_embedding_dim"):
            check_size(name, getattr(self, name))
        check(
            self.r % self.num_experts == 0,
            f"r must be a multiple of num_experts={self.num_experts}, so that experts have one rank, got {self.r}",
        )


class TaskGate(TaskSet):
    """``w(task) = softmax(gate @ e_task)``: the weights of the experts in every layer of the model.

    Attributes:
        embedding: ``[T + 1, d]``, standard normal (one row more than tasks, as in the released code; no id selects it).
        gate: ``[N, d]``, Kaiming.
    """

    def __init__(
        self,
        num_tasks: int,
        names: Sequence[str] | None,
        num_experts: int,
        dim: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_tasks, names)
        self.embedding = nn.Parameter(torch.empty(num_tasks + 1, dim, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        nn.init.kaiming_uniform_(self.gate, a=math.sqrt(5))

    @property
    def device(self) -> torch.device:
        return self.gate.device

    def weights(self, tasks: int | Tensor) -> Tensor:
        """Weights of resolved tasks, ``[1, N]`` or ``[G, N]``; they sum to 1, and are never below fp32."""
        ids = torch.full((1,), tasks, device=self.device) if isinstance(tasks, int) else tasks.reshape(-1)
        dtype = torch.promote_types(self.gate.dtype, torch.float32)
        return (F.embedding(ids, self.embedding).to(dtype) @ self.gate.to(dtype).T).softmax(-1)

    def part_sizes(self) -> dict[str, int]:
        return {"task embeddings": self.embedding.numel(), "gates": self.gate.numel()}


class MOELoRAAdapter(DiagonalAdapter):
    """``y += (alpha / r) sum_i w_i(task) B_i A_i dropout_i(x)``, the experts stacked in one A and one B.

    Every expert has a dropout mask of its own. The gate depends on the task alone and is tiny, so each layer evaluates
    it again; that keeps its gradient right under any kind of checkpointing.

    Attributes:
        A ``[r, in]``, N(0, 0.01^2); B ``[out, r]``, zeros. Expert i has the rows (columns) from ``i r / N`` on.
    """

    def __init__(
        self, in_features: int, out_features: int, config: MOELoRAConfig, shared: TaskGate, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, config, shared, **options)
        self.num_experts = config.num_experts
        self.expert_labels = tuple(range(1, config.num_experts + 1))
        self.reset_adapter_parameters()

    @classmethod
    def make_shared(
        cls,
        config: MOELoRAConfig,
        features: Mapping[str, tuple[int, int]],
        **factory: Any,
    ) -> TaskGate:
        size = (config.num_tasks, config.task_names, config.num_experts, config.task_embedding_dim)
        return TaskGate(*size, **factory)

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        nn.init.normal_(self.A, std=_STD)
        nn.init.zeros_(self.B)

    def route(self, task_ids: TaskIds | None = None) -> tuple[Tensor, Tensor]:
        """Every expert and its weight for each given task: ``([G, N], [G, N])``."""
        weights = self.shared.weights(self.shared.resolve(task_ids))
        return torch.arange(self.num_experts, device=weights.device).expand_as(weights), weights

    def core(self, tasks: int | Tensor) -> Tensor:
        return (
            self.shared.weights(tasks)
            .to(self.A.device)
            .repeat_interleave(self.geometry.rank // self.num_experts, dim=1)
        )

    def delta(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        if self.dropout_p == 0:
            return super().delta(x, task_ids)
        return self._per_sample(x, self._core(self.tasks_for(x, task_ids)))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: TaskIds | None = None) -> Tensor:
        if self.dropout_p == 0:
            return super().linear(x, weight, bias, task_ids)
        output = F.linear(x, weight, bias)
        return output + self.delta(x.to(output.dtype), task_ids)

    def shrink(self, x: Tensor) -> Tensor:
        if self.dropout_p == 0:
            return super().shrink(x)
        experts = self.A.to(x.dtype).chunk(self.num_experts)
        return torch.cat([F.linear(F.dropout(x, self.dropout_p), A) for A in experts], dim=-1)


class MOELoRALinear(AdaptedLinear, MOELoRAAdapter):
    """A frozen linear map and its MOELoRA adapter."""
