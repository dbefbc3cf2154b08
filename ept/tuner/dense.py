"""Which base layers hold a plain dense weight, and a plain copy of those that hold a quantised one."""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


def has_dense_weight(layer: nn.Module) -> bool:
    """Whether ``layer.weight`` is an ordinary floating tensor.

    Quantised weights are not: bitsandbytes stores integers, torchao a tensor class of its own that says it is floating.
    """
    weight = getattr(layer, "weight", None)
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module`` itself holds a weight of bitsandbytes, torchao or HQQ."""
    weight = getattr(module, "weight", None)
    of_library = type(weight).__module__.partition(".")[0] in ("bitsandbytes", "torchao")
    return hasattr(module, "W_q") or (isinstance(weight, Tensor) and of_library)


@torch.no_grad()
def dequantised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` with the values of its quantised weight in an ordinary one; ``module`` keeps its own.

    Args:
        module: a quantised linear layer, or another module of torchao (it quantises weights, not modules).

    Returns:
        ``nn.Linear`` for whatever has ``in_features``; it shares the bias.
    """
    weight = nn.Parameter(dequantize_module_weight(module).detach().to(dtype), requires_grad=False)
    if not hasattr(module, "in_features"):
        module.weight = weight
        return module
    with torch.device("meta"):
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
    plain.weight = weight
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)
