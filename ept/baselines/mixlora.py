"""MixLoRA: token-routed LoRA experts in every feed-forward network, plain LoRA elsewhere (arXiv 2404.15159)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_kernels import without_autocast

from ..adapted_linear import AdaptedLinear
from ..config import AdapterConfig, TaskRoutedPeftType, check, check_size, check_weight, is_int
from ..context import TaskContext
from ..layer_adapter import LayerAdapter, WeightedLosses
from ..tasks import TaskIds
from .mixlora_router import ENTRY, EXIT, Place, TokenRoute, TokenRouters, ffn_places, load_balance

MIXLORA = TaskRoutedPeftType("MIXLORA")


@dataclass
class MixLoRAConfig(AdapterConfig):
    """Configuration of MixLoRA; the defaults are the paper's. It treats all tasks alike: ``task_ids`` are optional.

    Args (beyond those of ``AdapterConfig``):
        r: rank of every expert.
        num_experts: LoRA experts in each linear of a feed-forward network.
        top_k: experts that a token uses.
        balance_weight: weight of the load-balance loss in the total; 0 switches it off.
    """

    r: int = 16
    num_experts: int = 8
    top_k: int = 2
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MIXLORA
        check_size("num_experts", self.num_experts)
        check(
            is_int(self.top_k) and 1 <= self.top_k <= self.num_experts,
            f"top_k must be an integer from 1 to num_experts={self.num_experts}, got {self.top_k!r}",
        )
        check_weight("balance_weight", self.balance_weight)


class MixLoRAAdapter(LayerAdapter):
    """One linear of ``FFN(x) = sum_e w_e FFN_e(x)``, or a plain LoRA outside feed-forward networks.

    An expert is a whole network, ``FFN_e``: its hidden units see the nonlinearity before they are mixed. Nothing is
    copied for that. The network's entry returns its hidden units once for each of a token's k experts, ``[k, ..., h]``:
    the frozen product once, plus each expert's LoRA. What follows it in the network works unit by unit and does not
    notice. The exit weights the k copies before its frozen product, which is linear and so is computed once as well,
    and adds each expert's LoRA of its own copy. A linear that is alone in its network mixes its experts' LoRA directly.

    Routing and LoRA are computed in the adapter's dtype, fp32 or wider. No result depends on a value that the host
    reads: a token's r-vectors of other experts are multiplied by zero.

    Attributes:
        A ``[E, r, in]``, Kaiming, and B ``[E, out, r]``, zeros; E = 1 outside feed-forward networks.
    """

    unmergeable = (
        "MixLoRA chooses experts for every token, so no one weight does what it does: it can be neither merged nor "
        "exported; unload() gives the base model back"
    )
    stacks = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: MixLoRAConfig,
        shared: TokenRouters,
        *,
        name: str = "",
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, config, shared, name=name)
        self.place = shared.places.get(name)
        self.scaling = config.lora_alpha / config.r
        experts = 1 if self.place is None else config.num_experts
        self.A = nn.Parameter(torch.empty(experts, config.r, in_features, **factory))
        self.B = nn.Parameter(torch.empty(experts, out_features, config.r, **factory))
        self.reset_adapter_parameters()

    @classmethod
    def make_shared(
        cls,
        config: MixLoRAConfig,
        features: Mapping[str, tuple[int, int]],
        **factory: Any,
    ) -> TokenRouters:
        places = ffn_places(features)
        if not places:
            raise ValueError(
                f"target_modules adapts {sorted(features)}, none of which belongs to a feed-forward network; "
                "MixLoRA has its experts there"
            )
        widths = {p.block: features[name][0] for name, p in places.items() if p.role != EXIT}
        tasks = (config.num_tasks, config.task_names)
        return TokenRouters(*tasks, places, widths, config.num_experts, config.top_k, **factory)

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        for expert in self.A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def around(self, base: Callable[[Tensor], Tensor], x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., in_features={self.in_features}], got {list(x.shape)}")
        if task_ids is not None:
            self.tasks_for(x, task_ids)
        if self.place is None:
            return _add(base(x), self._expand(self._shrink(x)))
        if self.place.role == EXIT:
            return self._leave(self.place, base, x)
        route = self.shared.route(self.place.block, x, for_exit=self.place.role == ENTRY)
        chosen = self._chosen(route)
        hidden = self._shrink(x)
        if self.place.role == ENTRY:
            return _add(base(x), self._expand(hidden * chosen.unsqueeze(-1)))  # [k, ..., out]
        return _add(base(x), self._expand(hidden * self._mixed(chosen, route).unsqueeze(-1)))

    def _leave(self, place: Place, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x ``[k, ..., hidden]``, a copy for each of a token's experts -> ``[..., out]``."""
        route = self.shared.last_route(place.block)
        chosen = self._chosen(route)
        weights = route.weights.movedim(-1, 0)  # [k, ...]
        with without_autocast(x.device):
            copies = x.to(self.A.dtype)
            # The weights sum to 1. In this form equal copies, as at the start, give a bit-identical value.
            mixed = copies[0] + (weights[1:].unsqueeze(-1) * (copies[1:] - copies[0])).sum(0)
        shares = (chosen * weights.unsqueeze(-1)).unsqueeze(-1)  # [k, ..., E, 1]
        return _add(base(mixed.to(x.dtype)), self._expand((self._shrink(x) * shares).sum(0)))

    def _shrink(self, x: Tensor) -> Tensor:
        """``A_e dropout(x)`` of every expert, ``[..., E, r]`` in the adapter's dtype."""
        with without_autocast(x.device):
            rows = F.dropout(x, self.dropout_p).to(self.A.dtype)
            return F.linear(rows, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])

    def _expand(self, hidden: Tensor) -> Tensor:
        """``(alpha / r) sum_e B_e hidden_e``: ``[..., E, r]`` -> ``[..., out]``."""
        with without_autocast(hidden.device):
            rows = hidden.flatten(-2).to(self.B.dtype)  # the route's weights are never below fp32
            return F.linear(rows, self.scaling * self.B.transpose(0, 1).flatten(1))

    def _chosen(self, route: TokenRoute) -> Tensor:
        """Ones at each token's experts, by place: ``[k, ..., E]``."""
        return F.one_hot(route.experts, len(self.A)).movedim(-2, 0).to(self.A.dtype)

    @staticmethod
    def _mixed(chosen: Tensor, route: TokenRoute) -> Tensor:
        """The weight of every expert for each token, ``[..., E]``."""
        return (chosen * route.weights.movedim(-1, 0).unsqueeze(-1)).sum(0)

    @classmethod
    def collects(cls, config: MixLoRAConfig) -> tuple[bool, bool]:
        return False, config.balance_weight > 0

    @classmethod
    def losses(
        cls,
        config: MixLoRAConfig,
        shared: TokenRouters,
        adapters: Mapping[str, LayerAdapter],
        context: TaskContext | None,
    ) -> WeightedLosses:
        """``load_balance_loss``, the mean over the networks of ``load_balance`` (**choice**: not the sum)."""
        if config.balance_weight == 0:
            return {}
        if context is None or not context.terms:
            raise ValueError("model has no training forward yet: call it in training mode, then ept.auxiliary_losses")
        device = context.terms[0].device  # the networks of a base may be on several
        loss = load_balance(torch.stack([term.to(device) for term in context.terms])).mean()
        learns = any(router.requires_grad for router in shared.routers.values())
        if torch.is_grad_enabled() and learns and not loss.requires_grad:
            raise ValueError(
                "the load-balance loss has no gradient: the forward pass ran without one, as under reentrant "
                "checkpointing; use gradient_checkpointing_kwargs={'use_reentrant': False}, or balance_weight=0"
            )
        return {"load_balance_loss": (config.balance_weight, loss)}

    def part_sizes(self) -> dict[str, int]:
        return {"experts" if self.place is not None else "factors": self.A.numel() + self.B.numel()}


def _add(output: Tensor, delta: Tensor) -> Tensor:
    return output + delta.to(output.dtype)


class MixLoRALinear(AdaptedLinear, MixLoRAAdapter):
    """A frozen linear map whose tokens mix LoRA experts, the whole of its feed-forward network."""
