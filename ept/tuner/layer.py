"""The PEFT layer: any number of named adapters around a frozen base layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ept_kernels.tracing import is_eager

from ..adapted_linear import WeightStash, check_stored_weight, check_transforms, keep_calling
from ..config import AdapterConfig
from ..context import current
from ..layer_adapter import LayerAdapter
from ..methods import method_of
from ..tasks import TaskSet
from .quantised import has_dense_weight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def base_features(layer: Any) -> tuple[int, int]:
    """``(in_features, out_features)`` of a layer that can be adapted.

    Raises:
        TypeError: another kind of layer.
    """
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    raise TypeError(f"EPT adapts nn.Linear and layers like it, and GPT-2's Conv1D; got {type(layer).__name__}")


def not_a_map(layer: Any) -> str | None:
    """Why an adapter cannot add to what ``layer`` returns: it does not map ``[..., in]`` to ``[..., out]``.

    Classes that derive from ``nn.Linear`` may return a router's choice, or want their input in groups. One that has its
    own ``forward`` and an ordinary weight is tried on a row of zeros, as a copy and in evaluation mode.
    """
    weight = layer._parameters.get("weight")
    ordinary = type(weight) is nn.Parameter and weight.dtype in _DTYPES
    if not ordinary or type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return None
    in_features, out_features = base_features(layer)
    if weight.shape != (out_features, in_features):  # sharded or transposed
        return None
    twin = copy.copy(layer)
    twin.training = False
    row = torch.zeros(1, 1, in_features, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            output = type(layer).forward(twin, row)
    except Exception as error:
        return f"it fails for an input of {list(row.shape)} ({error})"
    if not isinstance(output, Tensor):
        return f"it returns a {type(output).__name__}"
    if output.shape != (1, 1, out_features):
        return f"it returns {list(output.shape)} for an input of {list(row.shape)}"
    return None


def _call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return layer(x, *args, **kwargs)


class EPTLinearLayer(nn.Module, BaseTunerLayer):
    """A base layer and its adapters, by name; of whichever method, but all of one.

    Args:
        base_layer: ``nn.Linear``, anything with ``in_features`` and ``out_features`` that maps ``[..., in]`` to
            ``[..., out]``, or ``Conv1D``.

    Attributes:
        tied_to: another module with the same weight, if there was one when it was last looked for.
        read_by: who takes the weight without calling the layer for some arguments, which is refused when it happens.
    """

    adapter_layer_names: tuple[str, ...] = ("ept_adapters",)
    other_param_names: tuple[str, ...] = ()
    base_layer: Any  # a layer of any library
    ept_adapters: Any  # an nn.ModuleDict of LayerAdapters
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_features(self.get_base_layer())
        self.ept_adapters = nn.ModuleDict()
        self.ept_stash = WeightStash()
        self.merged_adapters: list[str] = []
        self.merged_task: int | None = None
        self.tied_to: str | None = None
        self.read_by: str | None = None
        self.register_forward_pre_hook(keep_calling)
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def update_layer(
        self, adapter_name: str, config: AdapterConfig, shared: TaskSet, layer_name: str, inference_mode: bool = False
    ) -> None:
        """Add an adapter, freshly initialised, beside the base weight.

        Args:
            shared: what the layers of this adapter share. layer_name: this layer's in the model.
        """
        base = self.get_base_layer()
        device, dtype = self._get_base_layer_device_and_dtype(base)
        half = dtype is None or not dtype.is_floating_point or dtype.itemsize < 4
        made: Any = method_of(config).adapter  # whose constructors take more than the base class's
        adapter = made(
            self.in_features,
            self.out_features,
            config.for_layer(layer_name),
            shared,
            name=layer_name,
            dtype=torch.float32 if half else dtype,
        )
        self.ept_adapters[adapter_name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype; the adapter of a half base stays fp32.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if adapter_name not in self.ept_adapters or device is None:
            return
        adapter = self.ept_adapters[adapter_name]
        if not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to(device)

    @property
    def weight(self) -> Tensor:
        """The base weight, as PEFT's layers show it.

        Raises:
            ValueError: a forward pass takes it, so that the adapter would have no effect.
        """
        if self.read_by is not None and self.enabled_adapters() and current() is not None:
            name = self.enabled_adapters()[0].layer_name
            raise ValueError(
                f"layer {name!r} is read past: {self.read_by} takes its weight itself, where an adapter has no effect; "
                "name it in exclude_modules, or leave out the arguments that lead there"
            )
        return super().weight

    def enabled_adapters(self) -> list[LayerAdapter]:
        """The adapters that take part in a forward pass."""
        if self.disable_adapters or self.merged:
            return []
        return [self.ept_adapters[name] for name in self.active_adapters if name in self.ept_adapters]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x ``[..., in]`` -> ``[..., out]``; tasks come from the model's forward or ``ept.use_tasks``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.enabled_adapters()
        if adapters and not is_eager(x):
            check_transforms(f"layer {adapters[0].layer_name!r}")
        if len(adapters) == 1 and not args and not kwargs and self._base_is_plain():
            base = self.base_layer
            weight = base.weight.T if isinstance(base, Conv1D) else base.weight
            return adapters[0].linear(x, weight, base.bias)
        if len(adapters) > 1 and not adapters[0].stacks:
            raise ValueError(f"one adapter of this method may be active at a time, got {self.active_adapters}")
        call: Callable[[Tensor], Tensor] = partial(_call, self.base_layer, args, kwargs)
        for adapter in adapters:
            call = partial(adapter.around, call)
        return call(x)

    def _base_is_plain(self) -> bool:
        """Whether base and adapter may run as one op: a plain dense base without hooks or a patched forward."""
        base = self.base_layer
        plain = type(base) in (nn.Linear, Conv1D) and "forward" not in base.__dict__
        dense = plain and has_dense_weight(base)  # torchao keeps nn.Linear and puts a quantised tensor into it
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return dense and not hooked

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, task: int | None = None
    ) -> None:
        """Put the update of one task into the base weight. Always safe: a result that is not finite is refused.

        Merging adapters one after the other equals merging them together: the sum is computed from the original weight
        every time.

        Args:
            adapter_names: default: the active ones. One that is merged already is passed over with a warning.
            task: resolved id; None where the adapter has one task.

        Raises:
            ValueError: a method that does not merge, no task given with more than one, another task than is merged, a
                base weight that is not a dense float, is computed at every call or is shared with another module, or a
                result that is not finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ept_adapters]
        if not names:
            return
        first = self.ept_adapters[names[0]]
        first.check_mergeable()
        resolved = first.shared.resolve(task)
        if self.merged and resolved != self.merged_task:
            raise ValueError(f"task must be {self.merged_task}, which is already merged, got {resolved}; unmerge first")
        base: Any = self.get_base_layer()
        if not has_dense_weight(base):
            held = type(getattr(base, "weight", None)).__name__
            raise ValueError(
                f"cannot merge into {type(base).__name__}: its weight is not a dense float tensor but {held}, and "
                "quantising the sum again would lose part of the update. ept.export_merged(..., dequantise=True) "
                "writes a merged floating-point checkpoint, ept.export_lora an adapter that needs no merging"
            )
        self.check_own_weight(first.layer_name)
        every = [*self.merged_adapters, *names]
        self.ept_stash.merge(base, [self.ept_adapters[name] for name in every], resolved, every)
        self.merged_adapters, self.merged_task = every, resolved

    def check_own_weight(self, name: str) -> None:
        """Raise ValueError if the dense weight of this layer, ``name``, is computed, or another module's too."""
        base: Any = self.get_base_layer()
        if has_dense_weight(base):
            check_stored_weight(base, f"layer {name!r}")
        if self.tied_to is not None:
            raise ValueError(
                f"layer {name!r} shares its weight with {self.tied_to!r}, which merging would change too: "
                "untie them before adapting, name the layer in exclude_modules, or use ept.export_lora"
            )

    def unmerge(self) -> None:
        """Restore the base weight, bit-identical; warns, as PEFT's layers do, where nothing is merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.ept_stash.unmerge(self.get_base_layer())
        self.merged_adapters, self.merged_task = [], None

    def get_delta_weight(self, adapter_name: str, task: int | str | None = None) -> Tensor:
        """The dense update of one adapter and task, ``[out, in]``."""
        return self.ept_adapters[adapter_name].delta_weight(task)

    def __repr__(self) -> str:
        return "ept." + super().__repr__()
