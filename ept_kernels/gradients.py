"""Gradients of the ops, for ``torch.library`` and for the functions that eager code runs instead.

``setup`` saves what backward needs, ``backward`` hands it to a backend; both have the signatures that
``torch.library.register_autograd`` and ``torch.autograd.Function`` share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import run
from .tracing import is_eager


def _run_backward(op: str, grad: Tensor, *args: Any) -> Sequence[Tensor | None]:
    """The backward op; without the detour through torch's dispatcher where nobody could tell."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    # with gradients on, the op itself refuses a second derivative
    if torch.is_grad_enabled() or not is_eager(grad, *tensors):
        return getattr(torch.ops.ept, op)(grad, *args)
    return run(op, grad, *args)


def _asked(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def weight_setup(ctx, inputs, output) -> None:
    A, B, folded, _, _, ctx.scales = inputs
    ctx.save_for_backward(A, B, folded)


def weight_backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    gradients = _run_backward("pyramid_weight_backward", grad, *ctx.saved_tensors, ctx.scales, needs)
    return *_asked(gradients, needs), None, None, None


def delta_setup(ctx, inputs, output) -> None:
    x, A, B, folded, groups, _, ctx.scales, ctx.dropout_p, seed, active = inputs
    ctx.save_for_backward(x, A, B, folded, groups, seed, active)


def delta_backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:4])
    *saved, seed, active = ctx.saved_tensors
    gradients = _run_backward("pyramid_delta_backward", grad, *saved, ctx.scales, needs, ctx.dropout_p, seed, active)
    return *_asked(gradients, needs), None, None, None, None, None, None


def linear_setup(ctx, inputs, output) -> None:
    x, weight, _, A, B, folded, groups, ctx.scales, ctx.dropout_p, seed, active = inputs
    ctx.save_for_backward(x, weight, A, B, folded, groups, seed, active)


def linear_backward(ctx, grad):
    need_x, need_weight, need_bias, *need_adapter = ctx.needs_input_grad[:6]
    needs = [need_x, *need_adapter]
    *saved, seed, active = ctx.saved_tensors
    gradients = _run_backward("pyramid_linear_backward", grad, *saved, ctx.scales, needs, ctx.dropout_p, seed, active)
    grad_x, *grad_adapter = _asked(gradients, needs)
    # The base is frozen in EPT, but an op must not drop a gradient that somebody asks for.
    grad_weight = grad.T @ saved[0] if need_weight else None
    grad_bias = grad.sum(0) if need_bias else None
    return grad_x, grad_weight, grad_bias, *grad_adapter, None, None, None, None, None
