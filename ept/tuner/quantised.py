"""Quantised base layers: which they are, their dequantised values, and training through them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def has_dense_weight(layer: nn.Module) -> bool:
    """Whether ``layer.weight`` is an ordinary floating tensor.

    Quantised weights are not: bitsandbytes stores integers, torchao a tensor class of its own that says it is floating.
    """
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module`` itself holds a weight of bitsandbytes, torchao or HQQ."""
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):  # shows its base's weight as its own
        return False
    weight = getattr(module, "weight", None)
    of_library = type(weight).__module__.partition(".")[0] in ("bitsandbytes", "torchao")
    return hasattr(module, "W_q") or (isinstance(weight, Tensor) and of_library)


def is_repacked(module: nn.Module) -> bool:
    """Whether a 4-bit weight has the layout of bitsandbytes' CPU kernel, which it gets at the first inference."""
    return getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def keep_differentiable(module: Any, args: tuple[Any, ...]) -> None:
    """A forward pre-hook for 4-bit layers: undo the CPU kernel's layout where a gradient for the input is wanted.

    That kernel has no backward pass. After one evaluation, training would go on without the gradients of all layers
    below, with a mere warning.
    """
    if torch.is_grad_enabled() and args and args[0].requires_grad and is_repacked(module):
        module.weight.data, module.weight.quant_state = _unpacked(module.weight)


def watch_4bit_layers(model: nn.Module) -> list[RemovableHandle]:
    """Put ``keep_differentiable`` on every 4-bit layer of ``model``, adapted or not."""
    layers = [m for m in model.modules() if is_quantised(m) and type(m.weight).__name__ == "Params4bit"]
    return [layer.register_forward_pre_hook(keep_differentiable) for layer in layers]


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight and its state in the layout of bitsandbytes' other functions; ``weight`` keeps its own."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse

    state = copy.copy(weight.quant_state)  # inverse changes the one that it is given
    scales = state.absmax
    values, state = inverse(weight.data, state)
    if not state.nested:  # bitsandbytes 0.50 leaves the scales in the kernel's order, which is wrong for wide layers
        state.absmax = scales.T.reshape(-1).float()
    return values, state


@torch.no_grad()
def dequantised(module: Any, dtype: torch.dtype) -> nn.Module:
    """``module`` with the values of its quantised weight in an ordinary one; its weight stays as it is.

    Args:
        module: a quantised linear layer, or another module with a weight of torchao, which quantises no modules.

    Returns:
        ``nn.Linear`` where ``module`` has ``in_features``; it shares the bias.
    """
    if is_repacked(module):
        from bitsandbytes.functional import dequantize_4bit

        values = dequantize_4bit(*_unpacked(module.weight))
    elif type(module.weight).__name__ == "Int8Params":  # PEFT's function would replace the weight of the layer
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        values = module.weight.data * (scales[:, None] / 127)
    else:
        values = dequantize_module_weight(module)
    weight = nn.Parameter(values.detach().to(dtype), requires_grad=False)
    if not hasattr(module, "in_features"):
        module.weight = weight
        return module
    with torch.device("meta"):
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
    plain.weight = weight
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)
