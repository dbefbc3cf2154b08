"""Whether code runs as written, or is watched by something that must see every op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or intercepts what happens to ``tensors``.

    Then an op may be called without ``torch.library``, whose detour costs several times as much as a small layer:
    there is no ``torch.compile`` or ``torch.jit.trace`` to write it into a graph, no ``torch.func`` transform, no
    dispatch mode (fake tensors, op counters), no forward-mode differentiation, no batched gradient, no tensor subclass
    and no lazy negation, whose memory holds other numbers than the tensor.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.is_neg() or torch._C._functorch.is_legacy_batchedtensor(tensor):
            return False
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


def refuse_batched(grad: Tensor) -> None:
    """Raise RuntimeError for a batched gradient of folded kernels; one that is merely watched may pass."""
    functorch = torch._C._functorch
    if functorch.is_legacy_batchedtensor(grad) or functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "the gradient of folded kernels cannot be batched (is_grads_batched, torch.func.vmap): native code "
            "computes it; EPT_BACKEND=torch computes it by tensor operations"
        )
