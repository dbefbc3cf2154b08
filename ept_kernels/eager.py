"""The ops on rows for code that runs as written: the same results and gradients, a fraction of the overhead.

``torch.library`` takes about a hundred microseconds for a call with autograd and its backward, several times a small
layer's own work; ``torch.autograd.Function`` takes a tenth. Compilers and everything else that must see ops get the
library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import keeps_for_backward, recomputes, run_forward
from .gradients import delta_backward, delta_save, linear_backward, linear_save
from .kept import Kept
from .library import Output
from .tracing import apply_eagerly, is_eager


def _run(op: str, args: tuple[Any, ...], keep: bool, kept: Kept | None = None) -> Output:
    *positional, dropout_p, seed, active = args
    return run_forward(op, *positional, dropout_p=dropout_p, seed=seed, active=active, keep=keep, kept=kept)


class _Delta(torch.autograd.Function):
    backward = staticmethod(delta_backward)

    @staticmethod
    def forward(ctx, *args: Any) -> Tensor:
        output = _run("pyramid_delta", args, keep=not recomputes())
        delta_save(ctx, args, output)
        return output.y.contiguous()


class _Linear(torch.autograd.Function):
    backward = staticmethod(linear_backward)

    @staticmethod
    def forward(ctx, *args: Any) -> Tensor:
        output = _run("pyramid_linear", args, keep=not recomputes())
        linear_save(ctx, args, output)
        return output.y.contiguous()


_FUNCTIONS = {"pyramid_delta": _Delta, "pyramid_linear": _Linear}

# Read once while a graph is traced: the choice is the graph's.
_keeps_in_graph = torch.compiler.assume_constant_result(keeps_for_backward)


def call(op: str, *args: Any, kept: Kept | None = None) -> Tensor:
    """``torch.ops.ept.<op>(*args)``'s first result, by the shortest path with the same result.

    ``kept``: where inference keeps what follows from parameters alone. On a GPU only: elsewhere it would save little.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not is_eager(*tensors):
        keep = trains and _keeps_in_graph(args[0].device, args[0].dtype)
        return getattr(torch.ops.ept, op)(*args, keep)[0]
    if trains:
        return apply_eagerly(_FUNCTIONS[op], *args)
    return _run(op, args, keep=False, kept=kept if args[0].is_cuda else None).y.contiguous()
