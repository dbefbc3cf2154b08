"""DCFT: a rank-one seed deconvolved by one kernel (arXiv 2503.01419); EPT with r = 1, one scale and no router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ept_kernels import PyramidGeometry, fold_kernels, pyramid_delta, pyramid_linear, pyramid_merge, pyramid_weight

from ..adapted_linear import AdaptedLinear
from ..config import AdapterConfig, TaskRoutedPeftType, check_size, check_weight
from ..context import TaskContext
from ..layer_adapter import LayerAdapter, WeightedLosses
from ..tasks import TaskIds, TaskSet

DCFT = TaskRoutedPeftType("DCFT")
_STD = 0.02  # of all three factors at the start


@dataclass
class DCFTConfig(AdapterConfig):
    """Configuration of DCFT. It has one expert and treats all tasks alike: ``task_ids`` are optional.

    Args (beyond those of ``AdapterConfig``):
        r: rank of the seed; the method has 1.
        kernel_size: k of the deconvolution.
        orthogonality_weight: weight of ``mean |norm(P)^2 - 1|`` over all factors P, in the total loss; 0 switches it
            off.
    """

    r: int = 1
    kernel_size: int = 8
    orthogonality_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DCFT
        check_size("kernel_size", self.kernel_size)
        check_weight("orthogonality_weight", self.orthogonality_weight)


class DCFTAdapter(LayerAdapter):
    """``W = (alpha / r) (B A) kron c``. At the start W is small (entries of about 8e-6 alpha), not zero: the paper's.

    Attributes:
        A ``[r, ceil(in / k)]``, B ``[ceil(out / k), r]``, c ``[k, k]``: all N(0, 0.02^2).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: DCFTConfig,
        shared: TaskSet,
        *,
        name: str = "",
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, config, shared, name=name)
        self.geometry = self._geometry(config, in_features, out_features)
        self.scaling = config.lora_alpha / config.r
        self.A = nn.Parameter(torch.empty(config.r, self.geometry.seed_width, **factory))
        self.B = nn.Parameter(torch.empty(self.geometry.seed_height, config.r, **factory))
        self.c = nn.Parameter(torch.empty(config.kernel_size, config.kernel_size, **factory))
        self.reset_adapter_parameters()

    @staticmethod
    def _geometry(config: DCFTConfig, in_features: int, out_features: int) -> PyramidGeometry:
        return PyramidGeometry(in_features, out_features, config.r, (config.kernel_size,))

    @classmethod
    def check_features(cls, config: DCFTConfig, in_features: int, out_features: int) -> None:
        cls._geometry(config, in_features, out_features)

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        for parameter in (self.A, self.B, self.c):
            nn.init.normal_(parameter, std=_STD)

    def _folded(self) -> tuple[Tensor, None]:
        """``(alpha / r) c``, packed for the ops, and no groups."""
        return fold_kernels([self.c], self.c.new_ones(1, 1), self.scaling, self.geometry), None

    def delta(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        return pyramid_delta(x, self.A, self.B, *self._folded(), self.geometry, dropout_p=self.dropout_p)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: TaskIds | None = None) -> Tensor:
        folded = self._folded()
        return pyramid_linear(x, weight, bias, self.A, self.B, *folded, self.geometry, dropout_p=self.dropout_p)

    def delta_weight(self, task: int | str | None = None) -> Tensor:
        self.resolve_one(task)
        return pyramid_weight(self.A, self.B, self._folded()[0], self.geometry)[0]

    def merge_into(self, weight: Tensor, task: int) -> Tensor:
        return pyramid_merge(weight, self.A, self.B, self._folded()[0], self.geometry)[0]

    @classmethod
    def losses(
        cls,
        config: DCFTConfig,
        shared: TaskSet,
        adapters: Mapping[str, LayerAdapter],
        context: TaskContext | None,
    ) -> WeightedLosses:
        """``mean |norm(P)^2 - 1|`` over the columns of B and the rows of A of every layer.

        **Choice**: the mean is over both factors of all layers alike; with r > 1 over their r vectors.
        """
        if config.orthogonality_weight == 0:
            return {}
        factors: Any = adapters.values()  # all of this class
        vectors = [rows for adapter in factors for rows in (adapter.A, adapter.B.T)]
        device = vectors[0].device
        distances = torch.cat([rows.float().square().sum(1).to(device) - 1 for rows in vectors])
        return {"orthogonality_loss": (config.orthogonality_weight, distances.abs().mean())}

    def part_sizes(self) -> dict[str, int]:
        return {"factors": self.A.numel() + self.B.numel(), "kernels": self.c.numel()}


class DCFTLinear(AdaptedLinear, DCFTAdapter):
    """A frozen linear map and its DCFT adapter."""
