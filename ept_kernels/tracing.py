"""What surrounds a call: whether something watches it that must see every op, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_is_batched, _is_wrapped = torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_functorch_wrapped_tensor


def constant_in_graphs(function: F) -> F:
    """A compiler calls ``function`` while it traces and keeps the answer.

    As ``torch.compiler.assume_constant_result``, which would import the compiler: two seconds for those who compile
    nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or intercepts what happens to ``tensors``.

    Then an op may be called without ``torch.library``, whose detour costs several times as much as a small layer:
    there is no ``torch.compile`` or ``torch.jit.trace`` to write it into a graph, no ``torch.func`` transform, no
    dispatch mode (fake tensors, op counters), no forward-mode differentiation, no batched gradient, no tensor subclass
    or wrapper and no lazy negation, whose memory holds other numbers than the tensor.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    # by ``map``: a loop would take as long as a small kernel
    return _PLAIN.issuperset(map(type, given)) and not (
        any(map(Tensor.is_neg, given)) or any(map(_is_batched, given)) or any(map(_is_wrapped, given))
    )


def is_exporting() -> bool:
    """Whether ``torch.export`` traces: a graph for every size of batch cannot choose by it."""
    return torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", lambda: False)()


def apply_eagerly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` where ``is_eager`` holds: without functorch's look at every argument."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def refuse_batched(grad: Tensor) -> None:
    """Raise RuntimeError for a batched gradient of folded kernels; one that is merely watched may pass."""
    if _is_batched(grad) or torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "the gradient of folded kernels cannot be batched (is_grads_batched, torch.func.vmap): native code "
            "computes it; EPT_BACKEND=torch computes it by tensor operations"
        )


@constant_in_graphs  # torch 2.6 cannot trace the question
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in which autocast leaves ``device`` alone; nothing on a device that has no autocast, such as meta."""
    if _has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would cast ``tensor`` for a matrix product, or None where it would not."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not (tensor.is_cpu or tensor.is_cuda or _has_autocast(device)):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
