"""What LoRA-like methods have in common: two factors and, between them, a diagonal core chosen by the task."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_kernels import PyramidGeometry, pyramid_delta, pyramid_linear, pyramid_weight, without_autocast
from ept_kernels.tracing import autocast_dtype

from ..config import AdapterConfig
from ..layer_adapter import LayerAdapter
from ..mixture import TaskMixture
from ..tasks import ResolvedTasks, TaskIds, TaskSet


class DiagonalAdapter(LayerAdapter):
    """``y += (alpha / r) B diag(c(task)) A dropout(x)``, with B zero at the start: an exact no-op then.

    A batch of one task is the pyramid op of scale 1 with c folded into A, on every backend. A batch of several is plain
    products with each sample's c on the ``[tokens, r]`` tensor between them. A subclass gives ``core``.

    Attributes:
        A: ``[r, in]``, Kaiming. B: ``[out, r]``, zeros.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: AdapterConfig,
        shared: TaskSet,
        *,
        name: str = "",
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, config, shared, name=name)
        self.geometry = PyramidGeometry(in_features, out_features, config.r, (1,))
        self.scaling = config.lora_alpha / config.r
        self.A = nn.Parameter(torch.empty(config.r, in_features, **factory))
        self.B = nn.Parameter(torch.empty(out_features, config.r, **factory))

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def core(self, tasks: int | Tensor) -> Tensor:
        """c of resolved tasks: ``[1, r]`` for one id, ``[N, r]`` for ``[N]``; without ``alpha / r``."""
        raise NotImplementedError

    def delta(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        core = self._core(self.tasks_for(x, task_ids))
        if core.shape[0] == 1:
            return pyramid_delta(x, self.A * core.T, self.B, *self._scalar(), self.geometry, dropout_p=self.dropout_p)
        return self._per_sample(x, core)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: TaskIds | None = None) -> Tensor:
        core = self._core(self.tasks_for(x, task_ids))
        if core.shape[0] == 1:
            A, groups = self.A * core.T, self._scalar()
            return pyramid_linear(x, weight, bias, A, self.B, *groups, self.geometry, dropout_p=self.dropout_p)
        output = F.linear(x, weight, bias)
        return output + self._per_sample(x.to(output.dtype), core)

    def delta_weight(self, task: int | str | None = None) -> Tensor:
        core = self._core(self.resolve_one(task))
        return pyramid_weight(self.A * core.T, self.B, self._scalar()[0], self.geometry)[0]

    def _core(self, tasks: ResolvedTasks) -> Tensor:
        with without_autocast(self.A.device):
            if isinstance(tasks, TaskMixture):
                return tasks.mix(self.core(tasks.every_task())).to(self.A.dtype)
            return self.core(tasks).to(self.A.dtype)

    def _scalar(self) -> tuple[Tensor, None]:
        """The folded kernel of scale 1, and no groups."""
        return self.A.new_full((1, 1), self.scaling), None

    def _per_sample(self, x: Tensor, core: Tensor) -> Tensor:
        """x ``[N m, ..., in]`` with one row of ``core [N, r]`` for each of N samples; as PEFT's LoRA multiplies."""
        dtype = autocast_dtype(x) or x.dtype
        with without_autocast(x.device):
            hidden = self.shrink(x.to(dtype))
            samples = core.shape[0]
            rows = math.prod(hidden.shape[:-1]) // max(samples, 1)
            scaled = hidden.reshape(samples, rows, hidden.shape[-1]) * (self.scaling * core).to(dtype)[:, None]
            return F.linear(scaled.reshape(hidden.shape), self.B.to(dtype))

    def shrink(self, x: Tensor) -> Tensor:
        """``A dropout(x)``: ``[..., in]`` -> ``[..., r]`` in the dtype of x."""
        return F.linear(F.dropout(x, self.dropout_p), self.A.to(x.dtype))

    def part_sizes(self) -> dict[str, int]:
        return {"factors": self.A.numel() + self.B.numel()}
