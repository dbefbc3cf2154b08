"""TuckA: its config, what its layers share, and the trainable part of one layer (arXiv 2511.06859)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_kernels import PyramidGeometry, pyramid_delta, pyramid_linear, pyramid_weight, without_autocast
from ept_kernels.tracing import autocast_dtype

from ...adapted_linear import AdaptedLinear
from ...config import AdapterConfig, TaskRoutedPeftType, check, check_positive, check_size
from ...context import current
from ...layer_adapter import LayerAdapter, add_rounded_once
from ...tasks import TaskIds, TaskNames, TaskSet
from .router import CentroidRouter, Route, fixed_route

TUCKA = TaskRoutedPeftType("TUCKA")

INITS = ("kaiming", "centred")


@dataclass
class TuckAConfig(AdapterConfig):
    """Configuration of TuckA (arXiv 2511.06859). The defaults are those of the authors' GLUE runs.

    Args (beyond those of ``AdapterConfig``, where tasks only name what a model's heads may want):
        r: rank of the basis U and side of every slice of a core.
        lora_alpha: scale alpha of the update; not divided by r, since the factors are divided by their norms.
        num_groups: K, groups of experts; a batch uses one.
        group_size: t, experts in a group.
        core_rank: p, slices of a group's core that its experts mix.
        centroid_noise: sigma, half the width of the uniform noise between the first centroids, in the units of the
            router's input.
        init: "kaiming" (the method) or "centred", which starts as a no-op (see ``TuckerAdapter``).
        router_module: name, or end of the name, of the adapted module that routes: the first one called in a forward
            pass. None: the one that the model's first pass calls first, if its input has the width of the first in the
            model's order of modules.
    """

    lora_alpha: float = 2.0
    num_groups: int = 2
    group_size: int = 2
    core_rank: int = 2
    centroid_noise: float = 10.0
    init: str = "kaiming"
    router_module: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TUCKA
        for name in ("num_groups", "group_size", "core_rank"):
            check_size(name, getattr(self, name))
        check(
            self.group_size >= 2 or self.num_groups == 1,
            f"group_size must be at least 2 where num_groups is {self.num_groups} (one score divided by its norm is "
            f"the same in every group), got {self.group_size!r}",
        )
        check_positive("centroid_noise", self.centroid_noise)
        check(
            isinstance(self.init, str) and self.init in INITS,
            f"init must be one of {', '.join(INITS)}, got {self.init!r}",
        )
        check(
            self.init != "centred" or self.core_rank >= 2,
            f"core_rank must be at least 2 where init is 'centred', got {self.core_rank!r}",
        )
        check(
            self.router_module is None or (isinstance(self.router_module, str) and bool(self.router_module)),
            f"router_module must be None or the name of a module, got {self.router_module!r}",
        )


class SharedRouter(TaskNames):
    """The router of an adapter, saved once with it, and which layer's input it sees.

    Args:
        config: the adapter's hyperparameters.
        width: of the input of the layer that routes. layer: that layer's name; without ``config.router_module`` a
            guess, until the first pass of the whole model shows which adapted layer is called first.
    """

    def __init__(
        self,
        config: TuckAConfig,
        width: int,
        layer: str,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config.num_tasks, config.task_names, device=device)
        self.layer, self.width = layer, width
        self._is_guess = config.router_module is None
        self.router = CentroidRouter(
            width, config.num_groups, config.group_size, config.centroid_noise, device=device, dtype=dtype
        )
        self.fixed: Route | None = None
        self._was_ready = False  # when the optimizer step under way began

    def reset_parameters(self) -> None:
        self.router.reset_parameters()

    def begin_step(self) -> None:
        self._was_ready = self.router.ready

    def drop_step(self) -> None:
        if not self._was_ready:  # the centroids were drawn from this step's batch
            self.router.reset_parameters()

    def part_sizes(self) -> dict[str, int]:
        return {"centroids": self.router.centroids.numel()}

    def fix(self, group: int, weights: Sequence[float] | Tensor) -> None:
        """Route every batch alike from now on, until ``free``; the adapter can then be merged.

        Raises:
            ValueError: a group that does not exist, or another number of weights than experts in a group.
        """
        self.fixed = fixed_route(group, weights, self.router.num_groups, self.router.group_size, device=self.device)

    def free(self) -> None:
        """Route by the batch again."""
        self.fixed = None

    def route(self, x: Tensor, layer: str) -> Route | None:
        """The route of the pass under way, or None while the router has no centroids.

        The pass's first adapted layer decides, every later one reads. So does a whole generation: its first pass, over
        the prompt, decides for all tokens. A checkpointed part that is repeated during backward decides again from the
        same input, uncounted. Outside of any pass a layer that owns its router decides for itself.

        Args:
            x: input of the layer. layer: its name.

        Raises:
            ValueError: the first layer of the pass is not the one whose input the router knows.
        """
        if self.fixed is not None:
            return Route(*(part.to(x.device) for part in self.fixed))
        context = current()

        def decide() -> Route | None:
            if self._is_guess and context is not None and context.owner is not None:
                self._is_guess = False
                if x.shape[-1] == self.width:
                    self.layer = layer
            if layer != self.layer:
                raise ValueError(
                    f"{layer} was called before {self.layer}, which routes: call the adapted model, not a part of it, "
                    f"and set router_module={layer!r} in the config if that is the first adapted layer of its pass"
                )
            if context is None:
                return self.router(x)
            return self.router(x, context.attention_mask, count=not context.recomputes)

        return decide() if context is None else context.once(self, decide)


def routing_layer(names: Sequence[str], wanted: str | None) -> str:
    """Which of the adapted modules routes: the first, or the one that ``wanted`` names or ends.

    Raises:
        ValueError: none or several match ``wanted``.
    """
    if wanted is None:
        return names[0]
    matches = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    if len(matches) != 1:
        raise ValueError(
            f"router_module must name one adapted module, got {wanted!r}, which {len(matches)} of them match; "
            f"the first ones are {', '.join(names[:4])}"
        )
    return matches[0]


UNMERGEABLE = (
    "TuckA picks a group and weights for every batch, so no task has a weight of its own to merge; fix one route "
    "first: ept.fix_route(model, group, weights)"
)


class TuckerAdapter(LayerAdapter):
    """The multiplicative update of one linear map's input, without the map: ``x -> x + alpha x U M U^T``.

    ``M = sum_i w_i sum_p C[i, p] G[g, p]`` for the route ``(g, w)`` of the batch; the chosen group's G, U and C are
    each divided by their Frobenius norm. M is one dense ``[r, r]`` matrix for the batch, so the update is the pyramid
    op of scale 1 with ``A = alpha (U M)^T``, ``B = U`` and the folded kernel 1: every backend serves it. Routes, norms
    and cores, their gradients included, are ordinary autograd on tensors no larger than ``[in, r]``.

    At the start the update is small, not zero: the norms of its factors are one, whatever their scale. "kaiming" is the
    method as published. "centred" draws the same values and takes from each row of C its mean: the slices of a core
    being equal at first, M is then zero for every route (exactly for p = 2, to rounding for more), while C and G get
    gradients from the first step and U from the second. It needs p >= 2.

    Args:
        in_features, out_features: sizes of the map.
        config: the adapter's hyperparameters.
        shared: the router. Referenced, not registered: its owner saves it.
        name: the map's name in its model.

    Attributes:
        G: ``[K, p, r, r]``, one slice copied to all at the start. U: ``[in, r]``. C: ``[t, p]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: TuckAConfig,
        shared: SharedRouter,
        *,
        name: str = "",
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, config, shared, name=name)
        self.geometry = PyramidGeometry(in_features, out_features, config.r, (1,))
        self.input_geometry = PyramidGeometry(in_features, in_features, config.r, (1,))
        self.alpha, self.init = config.lora_alpha, config.init
        self.G = nn.Parameter(torch.empty(config.num_groups, config.core_rank, config.r, config.r, **factory))
        self.U = nn.Parameter(torch.empty(in_features, config.r, **factory))
        self.C = nn.Parameter(torch.empty(config.group_size, config.core_rank, **factory))
        self.reset_adapter_parameters()

    @classmethod
    def make_shared(
        cls,
        config: TuckAConfig,
        features: Mapping[str, tuple[int, int]],
        **factory: Any,
    ) -> SharedRouter:
        layer = routing_layer(list(features), config.router_module)
        return SharedRouter(config, features[layer][0], layer, **factory)

    @classmethod
    def check_shardable(cls, shared: SharedRouter) -> None:
        if not shared.router.ready:
            raise ValueError(
                "TuckA draws its centroids in its first training pass, and what a pass writes into sharded parameters "
                "is lost: call the model once in training mode, on a batch of every process, before FSDP shards it"
            )

    @property
    def unmergeable(self) -> str | None:
        """Why there is nothing to merge, until the route is fixed."""
        return UNMERGEABLE if self.shared.fixed is None else None

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Kaiming-uniform values, all slices of all cores alike; the norms that they are divided by keep their scale
        out of the update, but not out of an optimizer's step relative to them."""
        nn.init.kaiming_uniform_(self.G[0, 0], a=math.sqrt(5))
        self.G.copy_(self.G[0, 0].clone().expand_as(self.G))
        nn.init.kaiming_uniform_(self.U, a=math.sqrt(5), mode="fan_out")
        nn.init.kaiming_uniform_(self.C, a=math.sqrt(5), mode="fan_out")
        if self.init == "centred":
            self.C.sub_(self.C.mean(1, keepdim=True))

    def factors(self, route: Route) -> tuple[Tensor, Tensor]:
        """``A [r, in]``, ``B [in, r]`` with ``x A^T B^T`` the update of a route; all norms are in A, so that B is U.

        Differentiable in G, U, C and the route's weights.
        """
        with without_autocast(self.U.device):
            slices = self.G.index_select(0, route.group.to(self.G.device))[0]
            shares = route.weights.to(self.C) @ self.C
            shares = shares * (self.alpha / (slices.norm() * self.C.norm() * self.U.square().sum()))
            core = (shares @ slices.flatten(1)).view_as(slices[0])
            return core.T @ self.U.T, self.U

    def update(self, x: Tensor, route: Route) -> Tensor:
        """``alpha x U M U^T``: what goes to the input of any layer. x ``[..., in]`` -> the same shape.

        Raises:
            ValueError: x of another width.
        """
        A, B = self.factors(route)
        return pyramid_delta(x, A, B, A.new_ones(1, 1), None, self.input_geometry, dropout_p=self.dropout_p)

    def around(self, base: Callable[[Tensor], Tensor], x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """The adapted map, for any ``base``: its input is changed. Without a route it is the base."""
        route = self.shared.route(x, self.layer_name)
        return base(x if route is None else x + self.update(x, route))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: TaskIds | None = None) -> Tensor:
        """The adapted linear, x ``[..., in]`` -> ``[..., out]``; weight ``[out, in]``, bias ``[out]`` or None.

        In half precision the update goes through the weight: ``x W^T + x A^T (W U)^T``, one op that rounds the sum
        once. Added to x it would mostly be lost: an update of 3e-4 of x, the usual size at the start, is less than the
        distance of two bfloat16 numbers, and a fifth of it survives.

        Raises:
            ValueError: x of another width, or a weight or bias of another shape or dtype.
        """
        route = self.shared.route(x, self.layer_name)
        if route is None:
            return F.linear(x, weight, bias)
        if (autocast_dtype(x) or x.dtype).itemsize >= 4:
            return F.linear(x + self.update(x, route), weight, bias)
        A, B = self.factors(route)
        through = self._through(weight, B)
        return pyramid_linear(
            x, weight, bias, A, through, A.new_ones(1, 1), None, self.geometry, dropout_p=self.dropout_p
        )

    def weight_update(self, weight: Tensor, route: Route) -> Tensor:
        """What a fixed route adds to a weight: ``W (I + alpha U M U^T)^T - W = alpha (W U) M^T U^T``.

        weight ``[out, in]`` -> ``[out, in]`` in the adapter's dtype; differentiable.
        """
        A, B = self.factors(route)
        return pyramid_weight(A, self._through(weight.to(A.dtype), B), A.new_ones(1, 1), self.geometry)[0]

    @staticmethod
    def _through(weight: Tensor, B: Tensor) -> Tensor:
        """``W U``: the basis as the outputs see it, ``[out, r]`` in the dtype of B."""
        with without_autocast(weight.device):
            return (weight @ B.to(weight.dtype)).to(B.dtype)

    def delta_weight(self, task: int | str | None = None) -> Tensor:
        """Always refused: the update multiplies the weight, see ``weight_update``.

        Raises:
            ValueError: always.
        """
        raise ValueError("TuckA's update depends on the weight that it multiplies; use weight_update(weight, route)")

    def merge_into(self, weight: Tensor, task: int) -> Tensor:
        """``weight [out, in]`` under the fixed route, added in at least fp32 and rounded once; ``task`` is any.

        Raises:
            ValueError: the route is not fixed.
        """
        if self.unmergeable is not None:
            raise ValueError(self.unmergeable)
        return add_rounded_once(weight, self.weight_update(weight, self.shared.fixed))

    def part_sizes(self) -> dict[str, int]:
        return {"cores": self.G.numel(), "bases": self.U.numel(), "expert factors": self.C.numel()}


class TuckALinear(AdaptedLinear, TuckerAdapter):
    """``y = (x + alpha x U M U^T) W0^T + b`` with W0 and b frozen (arXiv 2511.06859).

    By itself a layer has a router of its own and routes each call. Layers that share one (``shared``, the first one's
    ``routing``) and are called inside one ``ept.use_tasks`` block route once, by the input of the first called.
    """

    def keep_own(self, shared: TaskSet | None) -> None:
        self.routing = shared
