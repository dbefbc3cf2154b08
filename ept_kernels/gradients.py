"""Gradients of the ops, for ``torch.library`` and for the functions that eager code runs instead.

``save`` stores what backward needs, ``backward`` hands it to a backend; both serve
``torch.library.register_autograd`` and ``torch.autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import run, run_backward
from .library import Output
from .tracing import is_eager


def _runs_directly(*tensors: Tensor | None) -> bool:
    """Whether a backward may skip torch's dispatcher. With gradients on, the op refuses a second derivative."""
    return not torch.is_grad_enabled() and is_eager(*tensors)


def _asked(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def weight_setup(ctx, inputs, output) -> None:
    A, B, folded, _, _, ctx.scales = inputs
    ctx.save_for_backward(A, B, folded)


def weight_backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    arguments = (grad, *ctx.saved_tensors, ctx.scales, needs)
    if _runs_directly(grad, *ctx.saved_tensors):
        gradients = run("pyramid_weight_backward", *arguments)
    else:
        gradients = torch.ops.ept.pyramid_weight_backward(*arguments)
    return *_asked(gradients, needs), None, None, None


def _save(
    ctx,
    inputs: tuple[Tensor | None, ...],
    scales: Sequence[int],
    dropout: tuple[float, Tensor | None],
    active: Tensor | None,
    kept: Sequence[Tensor | None],
) -> None:
    """``inputs`` are those of the backward op between the gradient and ``scales``."""
    dropout_p, seed = dropout
    ctx.plan = (scales, dropout_p, len(inputs))
    ctx.save_for_backward(*inputs, seed, active, *(tensor for tensor in kept if tensor is not None))


def _backward(ctx, op: str, grad: Tensor, needs: list[bool]) -> Sequence[Tensor | None]:
    scales, dropout_p, count = ctx.plan
    saved = ctx.saved_tensors
    inputs, seed, active, kept = saved[:count], saved[count], saved[count + 1], saved[count + 2 :]
    if _runs_directly(grad, *saved):
        return run_backward(op, grad, *inputs, scales, needs, dropout_p=dropout_p, seed=seed, active=active, kept=kept)
    return getattr(torch.ops.ept, op)(grad, *inputs, scales, needs, dropout_p, seed, active, *kept)


def delta_save(ctx, inputs: tuple[Any, ...], output: Output) -> None:
    x, A, B, folded, groups, _, scales, dropout_p, seed, active = inputs
    _save(ctx, (x, A, B, folded, groups), scales, (dropout_p, seed), active, output[1:])


def delta_backward(ctx, grad: Tensor, *_: Tensor | None):
    needs = list(ctx.needs_input_grad[:4])
    gradients = _asked(_backward(ctx, "pyramid_delta_backward", grad, needs), needs)
    return *gradients, *[None] * (len(ctx.needs_input_grad) - 4)


def linear_save(ctx, inputs: tuple[Any, ...], output: Output) -> None:
    x, weight, _, A, B, folded, groups, scales, dropout_p, seed, active = inputs
    _save(ctx, (x, weight, A, B, folded, groups), scales, (dropout_p, seed), active, output[1:])


def linear_backward(ctx, grad: Tensor, *_: Tensor | None):
    need_x, need_weight, need_bias, *need_adapter = ctx.needs_input_grad[:6]
    needs = [need_x, *need_adapter]
    grad_x, *grad_adapter = _asked(_backward(ctx, "pyramid_linear_backward", grad, needs), needs)
    # The base is frozen in EPT, but an op must not drop a gradient that somebody asks for.
    grad_weight = grad.T @ ctx.saved_tensors[0] if need_weight else None
    grad_bias = grad.sum(0) if need_bias else None
    return grad_x, grad_weight, grad_bias, *grad_adapter, *[None] * (len(ctx.needs_input_grad) - 6)
