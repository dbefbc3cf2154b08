"""The PEFT layer: any number of named TuckA adapters before a frozen base layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ept.merging import WeightStash, keep_calling
from ept.tuner.layer import base_features

from .adapter import TuckerAdapter
from .config import TuckAConfig
from .route import Route, fixed_route
from .router import CentroidRouter
from .sharing import shared_route

NO_ROUTE = (
    "TuckA picks a group and weights for every batch, so no task has a weight of its own to merge; merge one fixed "
    "route with group=..., weights=[...] (one weight for each expert of a group)"
)


class TuckALayer(nn.Module, BaseTunerLayer):
    """A base layer and its TuckA adapters, by name. With several active ones their updates of the input add up.

    Args:
        base_layer: ``nn.Linear``, anything with ``in_features`` and ``out_features`` that maps ``[..., in]`` to
            ``[..., out]``, or ``Conv1D``.
        name: in its model, for errors.
    """

    adapter_layer_names: tuple[str, ...] = ("tucka_adapters",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self.in_features, self.out_features = base_features(self.get_base_layer())
        self.tucka_adapters = nn.ModuleDict()
        self.tucka_stash = WeightStash()
        self._routers: dict[str, CentroidRouter] = {}  # registered by the model, which saves them once
        self._routing: set[str] = set()
        self.merged_adapters: list[str] = []
        self.register_forward_pre_hook(keep_calling)
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def update_layer(
        self, adapter_name: str, config: TuckAConfig, router: CentroidRouter, *, routes: bool, inference_mode: bool
    ) -> None:
        """Add an adapter, freshly initialised; ``routes``: this layer's input decides for the model."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        half = dtype is None or not dtype.is_floating_point or dtype.itemsize < 4
        self.tucka_adapters[adapter_name] = TuckerAdapter(
            self.in_features,
            self.out_features,
            rank=config.r,
            num_groups=config.num_groups,
            group_size=config.group_size,
            core_rank=config.core_rank,
            alpha=config.alpha,
            init=config.init,
            dtype=torch.float32 if half else dtype,
        ).train(self.training)
        self._routers[adapter_name] = router
        self._routing.discard(adapter_name)
        if routes:
            self._routing.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._routers.pop(adapter_name, None)
        self._routing.discard(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype; the adapter of a half base stays fp32.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if adapter_name not in self.tucka_adapters or device is None:
            return
        adapter = self.tucka_adapters[adapter_name]
        if not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to(device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x ``[..., in]`` -> ``[..., out]``; the route is that of the forward pass under way."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        routed = [] if self.disable_adapters or self.merged else self._routed(x)
        if len(routed) == 1 and not args and not kwargs and self._base_is_plain():
            ((adapter, route),) = routed
            base = self.base_layer
            return adapter.linear(x, base.weight.T if isinstance(base, Conv1D) else base.weight, base.bias, route)
        changed = x
        for adapter, route in routed:
            changed = changed + adapter.update(x, route)
        return self.base_layer(changed, *args, **kwargs)

    def _routed(self, x: Tensor) -> list[tuple[TuckerAdapter, Route]]:
        """The active adapters that have a route in this pass."""
        found = []
        for name in self.active_adapters:
            if name in self.tucka_adapters:
                route = shared_route(self._routers[name], x, routes=name in self._routing, layer=self.name)
                if route is not None:
                    found.append((self.tucka_adapters[name], route))
        return found

    def _base_is_plain(self) -> bool:
        """Whether the adapter may use the base's weight: a plain dense base that nobody has hooked or patched."""
        base = self.base_layer
        plain = type(base) in (nn.Linear, Conv1D) and "forward" not in base.__dict__
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return plain and not hooked

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        group: int | None = None,
        weights: Any = None,
    ) -> None:
        """Put the updates of one fixed route into the base weight. Always safe: a result that is not finite is refused.

        Args:
            adapter_names: default: the active ones.
            group, weights: the route: one group, and a weight for each of its experts.

        Raises:
            ValueError: no route, already merged, a base weight that is not a dense float, or a result that is not
                finite; nothing is changed then.
        """
        names = check_adapters_to_merge(self, adapter_names)
        adapters = [self.tucka_adapters[name] for name in names if name in self.tucka_adapters]
        if not adapters:
            return
        if self.merged:
            raise ValueError(f"adapters {self.merged_adapters} are already merged; unmerge them first")
        if group is None or weights is None:
            raise ValueError(NO_ROUTE)
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise ValueError(f"cannot merge into {type(base).__name__}: its weight is not a dense float tensor")
        plain = weight.detach().T if isinstance(base, Conv1D) else weight.detach()
        with torch.no_grad():
            total = plain.to(torch.promote_types(plain.dtype, torch.float32))
            for adapter in adapters:
                route = fixed_route(group, weights, adapter.num_groups, adapter.group_size, device=adapter.U.device)
                total = total + adapter.delta_weight(plain, route)
            merged = (total.T if isinstance(base, Conv1D) else total).to(weight.dtype).contiguous()
        if not torch.isfinite(merged).all():
            raise ValueError(f"merging group {group} gives a weight that is not finite; nothing was changed")
        self.tucka_stash.swap_in(weight, merged)
        self.merged_adapters = list(names)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit; does nothing where nothing is merged."""
        if self.merged:
            self.tucka_stash.swap_out(self.get_base_layer().weight)
            self.merged_adapters = []

    def __repr__(self) -> str:
        return "tucka." + super().__repr__()
