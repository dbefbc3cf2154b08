"""``AdaptedLinear``: a frozen linear map and its adapter in one module; and what merging is, here and in the tuner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from ept_kernels.tracing import is_eager

from .config import AdapterConfig
from .context import current
from .layer_adapter import LayerAdapter
from .mixture import TaskMixture
from .readers import weights_read_by
from .tasks import ResolvedTasks, TaskIds, TaskSet

if TYPE_CHECKING:
    from typing_extensions import Self


def check_transforms(layer: str) -> None:
    """Refuse transforms that an adapter's ops do not support while it is not merged.

    ``vmap`` over samples of one task works, and so does ``torch.export``.

    Raises:
        RuntimeError: derivatives by ``torch.func``, or an export to ONNX.
    """
    functorch = torch._C._functorch
    transformed = not torch.compiler.is_compiling() and functorch.peek_interpreter_stack() is not None
    if transformed and any(level.key() != functorch.TransformType.Vmap for level in functorch.get_interpreter_stack()):
        raise RuntimeError(
            f"{layer} is differentiated by torch.func, which does not reach into the adapter's ops: use backward() or "
            "torch.autograd.grad, one sample at a time for per-sample gradients, or merge first"
        )
    if not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"{layer} cannot be written as ONNX with its adapter: merge first (merge, merge_and_unload)")


def merged_weight(
    weight: Tensor,
    adapters: list[LayerAdapter],
    task: int,
    *,
    transposed: bool = False,
    names: Sequence[str] = (),
) -> Tensor:
    """``weight + sum of the adapters' updates`` for one task, added in at least fp32 and rounded once.

    Args:
        weight: ``[out, in]``, or ``[in, out]`` with ``transposed`` (GPT-2's ``Conv1D``).
        task: resolved id.
        names: of the adapters, for the error.

    Raises:
        ValueError: the result is not finite; nothing has been changed then.
    """
    total = weight.detach().T if transposed else weight.detach()
    if len(adapters) > 1:  # one is rounded once by the op; a sum of several is held in a wider dtype until its end
        dtypes = (torch.float32, *(p.dtype for adapter in adapters for p in adapter.parameters()))
        total = total.to(reduce(torch.promote_types, dtypes, total.dtype))
    with torch.no_grad():
        for adapter in adapters:
            total = adapter.merge_into(total, task)
    total = (total.T if transposed else total).to(weight.dtype).contiguous()
    if not torch.isfinite(total).all():
        # PEFT's own words, which its users look for.
        whose = f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: "
        message = f"merging task {task} gives a weight that is not finite; nothing was changed"
        raise ValueError(f"{whose if names else ''}{message}")
    return total


def computes_weight(module: nn.Module) -> bool:
    """Whether a weight or bias of ``module`` is computed, by a parametrisation or a hook such as ``weight_norm``'s."""
    held = (module.__dict__.get(name) for name in ("weight", "bias"))
    return is_parametrized(module) or any(isinstance(value, Tensor) for value in held)


def check_stored_weight(module: nn.Module, name: str) -> None:
    """Refuse a weight that is computed at every call: what is put into it is lost at the next one.

    Args:
        name: what the error calls ``module``.

    Raises:
        ValueError: a parametrised, normed or pruned weight, or one that accelerate loads for each call.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{name} ({type(module).__name__}) computes its weight at every call (a parametrisation, weight_norm, "
            "spectral_norm, pruning), so nothing can be merged into it; make the weight an ordinary parameter first, "
            "as torch.nn.utils.parametrize.remove_parametrizations does"
        )
    if weight.is_meta and getattr(module, "_hf_hook", None) is not None:
        raise ValueError(f"{name} is offloaded: its weight is loaded for each call, and nothing can be merged into it")


def check_merged_task(tasks: ResolvedTasks, merged_task: int) -> None:
    """Refuse a call for another task than the one whose update is in the weight.

    Raises:
        ValueError: another task.
    """
    message = f"task_ids must be {merged_task}, the task that is merged into the weight; unmerge first"
    if isinstance(tasks, TaskMixture):
        raise ValueError(f"{message} (got a mixture of tasks)")
    if isinstance(tasks, int):
        if tasks != merged_task:
            raise ValueError(f"{message} (got {tasks})")
    elif torch.compiler.is_compiling():
        torch._assert_async(tasks.eq(merged_task).all(), message)
    else:
        try:
            torch._assert_async(tasks.eq(merged_task).all(), message)
        except RuntimeError as error:
            raise ValueError(f"{message} (got {tasks.tolist()})") from error


class WeightStash(nn.Module):
    """The original of a frozen weight while updates are merged into it: moves with its layer, is never saved.

    Merging swaps the parameter's storage instead of adding into it, so unmerging restores the same bits.

    Attributes:
        original: the weight without updates; None while nothing is merged.
    """

    original: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("original", None, persistent=False)

    def merge(self, layer: Any, adapters: list[LayerAdapter], task: int, names: Sequence[str] = ()) -> None:
        """Put the sum of ``original`` and the adapters' updates for a resolved task into ``layer.weight``.

        Args:
            layer: with a dense weight ``[out, in]``, or GPT-2's ``Conv1D``.
            names: of the adapters, for the error.

        Raises:
            ValueError: the result is not finite; nothing has been changed then.
        """
        weight = layer.weight
        original = weight if self.original is None else self.original
        merged = merged_weight(original, adapters, task, transposed=isinstance(layer, Conv1D), names=names)
        self.original, weight.data = original.data, merged

    def unmerge(self, layer: Any) -> None:
        """Restore ``layer.weight``, bit-identical, where something is merged."""
        if self.original is not None:
            layer.weight.data, self.original = self.original, None


def keep_calling(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing, but tells PyTorch that the layer must be called.

    ``nn.TransformerEncoderLayer`` in evaluation otherwise reads ``weight`` itself, and the adapter has no effect.
    """


def _announce(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    announced = getattr(type(child), "became_part", None)
    if announced is not None:
        announced(child, parent, name)


def watch_registrations() -> None:
    """Call ``child.became_part(parent, name)``, where a child has that, before it is made a part of ``parent``."""
    register_module_module_registration_hook(_announce)


def check_tasks(argument: str, shared: TaskSet, config: AdapterConfig) -> None:
    """Raise ValueError if ``shared``, which ``argument`` gave, has another number of tasks than ``config``."""
    if shared.num_tasks != config.num_tasks:
        raise ValueError(f"{argument} has {shared.num_tasks} tasks, but config.num_tasks is {config.num_tasks}")


class AdaptedLinear(LayerAdapter):
    """A ``LayerAdapter`` with the map it adapts; a method's layer is ``class XLinear(AdaptedLinear, XAdapter)``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``. With a half dtype the adapter stays fp32.
        config: the adapter's hyperparameters.
        shared: what layers share, made by ``make_shared`` and saved by the caller. None: the layer has its own.

    Attributes:
        weight ``[out, in]``, bias ``[out]`` or None: frozen.

    Raises:
        ValueError: sizes that do not fit the config, ``shared`` of another number of tasks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: AdapterConfig,
        shared: TaskSet | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight_dtype = dtype or torch.get_default_dtype()
        factory: Any = {"device": device, "dtype": torch.promote_types(weight_dtype, torch.float32)}
        owned: TaskSet | None = None
        if shared is None:
            self.check_features(config, in_features, out_features)
            shared = owned = self.make_shared(config, {"": (in_features, out_features)}, **factory)
        else:
            check_tasks("shared", shared, config)
        # The next class in the order is the method's, which takes a device and a dtype too.
        super().__init__(in_features, out_features, config, shared, **factory)
        self.keep_own(owned)
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=weight_dtype), requires_grad=False
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=weight_dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self.stash = WeightStash()
        self.merged_task: int | None = None
        self.register_forward_pre_hook(keep_calling)
        self._reset_base_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any, shared: Any = None) -> Self:
        """Adapt an existing ``nn.Linear``; its parameters are shared, not copied, and become frozen.

        Raises:
            TypeError: not an ``nn.Linear``.
            ValueError: its weight or bias is computed at every call, so there is no parameter to share, or its class
                has a ``forward`` of its own, which the layer would not run.
        """
        return cls._from_linear(linear, config, shared=shared)

    @classmethod
    def _from_linear(cls, linear: nn.Linear, config: Any, **shared: Any) -> Self:
        """``from_linear``, with what layers share by the name that the class gives this argument."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        if type(linear).forward is not nn.Linear.forward:
            raise ValueError(
                f"linear ({type(linear).__name__}) has a forward pass of its own, which the layer would not run: "
                "adapt its model by get_peft_model"
            )
        if not {"weight", "bias"} <= linear._parameters.keys():
            raise ValueError(
                f"linear ({type(linear).__name__}) computes its weight or bias at every call (a parametrisation, "
                "weight_norm, spectral_norm); make them ordinary parameters first, or adapt its model by get_peft_model"
            )
        with torch.device("meta"):  # sizes are checked before anything is allocated or changed
            layer = cls(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                config=config,
                dtype=linear.weight.dtype,
                **shared,
            )
        frozen = {name: getattr(linear, name) for name in ("weight", "bias") if getattr(linear, name) is not None}
        for name, parameter in frozen.items():
            setattr(layer, name, parameter.requires_grad_(False))
        layer._materialize_adapter(linear.weight.device)
        return layer.train(linear.training)

    def keep_own(self, shared: TaskSet | None) -> None:
        """Register what the layer shares with no other; None where it does. Its name is in the layer's state dict."""
        self.own_shared = shared

    def became_part(self, parent: nn.Module, name: str) -> None:
        """Refuse a place where the layer would not be called.

        Raises:
            ValueError: ``parent`` reads the weight itself.
        """
        if (name,) in weights_read_by(parent).always:
            raise ValueError(
                f"{name!r} of a {type(parent).__name__} cannot be a {type(self).__name__}: the parent takes its weight "
                "itself, as fused kernels do, where an adapter has no effect"
            )

    def _materialize_adapter(self, device: torch.device) -> None:
        """Give the adapter's parameters and buffers (not the base's) storage on ``device`` and fresh initial values."""
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                is_base = module is self and name in ("weight", "bias")
                if parameter is not None and parameter.is_meta and not is_base:
                    module._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
                    )
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
        for part in self.children():
            if isinstance(part, TaskSet):  # its own
                part.reset_parameters()
        self.reset_adapter_parameters()

    def _reset_base_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def reset_parameters(self) -> None:
        """Fresh base and adapter, as after construction."""
        self._reset_base_parameters()
        self.reset_adapter_parameters()

    @property
    def merged(self) -> bool:
        """Whether a task's update is in ``weight``."""
        return self.merged_task is not None

    def forward(self, x: Tensor, task_ids: TaskIds | None = None) -> Tensor:
        """x ``[..., in]`` -> ``[..., out]``.

        Args:
            x: any floating dtype that the base weight takes; its first dimension is the batch.
            task_ids: an id or name for all, or one for each sample; None where ``config.num_tasks`` is 1, where the
                method treats all tasks alike, or inside ``ept.use_tasks``.

        Raises:
            ValueError, TypeError: missing or unknown task ids, a wrong number of them, x of another width.
        """
        if self.merged_task is not None:
            return self._forward_merged(x, task_ids, self.merged_task)
        if not is_eager(x):
            check_transforms(f"this {type(self).__name__}")
        return self.linear(x, self.weight, self.bias, task_ids)

    def _forward_merged(self, x: Tensor, task_ids: TaskIds | None, merged_task: int) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., in_features={self.in_features}], got {list(x.shape)}")
        if self.shared.routes:
            context = current() if task_ids is None and self.shared.num_tasks > 1 else None
            if task_ids is not None or (context is not None and context.task_ids is not None):
                check_merged_task(self.tasks_for(x, task_ids), merged_task)
        return F.linear(x, self.weight, self.bias)

    def merge(self, task: int | str | None = None) -> None:
        """Put one task's update into ``weight``: zero inference cost until ``unmerge``.

        Raises:
            ValueError: a method that does not merge, a weight that is computed (``parametrize``, ``weight_norm``),
                already merged, an unknown task, or a result that is not finite; nothing is changed then.
        """
        self.check_mergeable()
        check_stored_weight(self, "the layer")
        if self.merged:
            raise ValueError(f"task {self.merged_task} is already merged into the weight; unmerge it first")
        resolved = self.shared.resolve(task)
        if not isinstance(resolved, int):
            raise TypeError(f"task must be one id or name, got {task!r}")
        self.stash.merge(self, [self], resolved)
        self.merged_task = resolved

    def unmerge(self) -> None:
        """Restore the original ``weight``, bit-identical; does nothing where nothing is merged."""
        self.stash.unmerge(self)
        self.merged_task = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A merged layer saves its original weight: the update is in the adapter's parameters already."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self.stash.original

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Loading replaces what is merged, so it is taken out first."""
        self.unmerge()
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
