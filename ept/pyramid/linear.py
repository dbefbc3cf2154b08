"""``EPTLinear``: a drop-in for ``nn.Linear`` that adapts a frozen weight to many tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..adapted_linear import AdaptedLinear, check_tasks
from ..config import EPTConfig
from ..task_table import TaskTable
from ..tasks import TaskSet
from .adapter import PyramidAdapter

if TYPE_CHECKING:
    from typing_extensions import Self


class EPTLinear(AdaptedLinear, PyramidAdapter):
    """``y = x W0^T + b + (alpha / r) sum_e g_e(task) s_e dropout(x) W_e^T`` with W0 and b frozen (spec section 1).

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``. With a half dtype the adapter stays fp32.
        config: the adapter's hyperparameters.
        task_table: embeddings shared with other layers, saved by the caller. None: the layer has its own, or none with
            ``routing="token"``.

    Attributes:
        weight ``[out, in]``, bias ``[out]`` or None: frozen.
        A, B, kernels, gate: trainable, see ``PyramidAdapter``.

    Raises:
        ValueError: sizes that do not fit (a scale larger than the layer, a task table of another number of tasks).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: EPTConfig,
        task_table: TaskTable | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if task_table is not None:
            check_tasks("task_table", task_table, config)
        super().__init__(in_features, out_features, bias, config=config, shared=task_table, device=device, dtype=dtype)

    def keep_own(self, shared: TaskSet | None) -> None:
        self.task_embeddings = shared

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: EPTConfig, task_table: TaskTable | None = None) -> Self:
        """Adapt an existing ``nn.Linear``; its parameters are shared, not copied, and become frozen.

        Raises:
            TypeError: not an ``nn.Linear``.
            ValueError: its weight or bias is computed at every call, so there is no parameter to share.
        """
        return cls._from_linear(linear, config, task_table=task_table)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r={self.geometry.rank}, kernel_sizes={self.geometry.kernel_sizes}, "
            f"top_k={self.top_k}" + (", routing=token" if self.by_token else "")
        )
