"""``torch.library`` ops: schemas, fakes, autograd. Each real implementation asks ``dispatch`` for a backend.

Rows are 2-D here; ``functional`` validates, flattens and handles autocast. ``groups [N]`` gives the row of ``folded``
for each of N equal runs of consecutive rows (N divides T: 1, one a sample, or one a row); None means row 0 for all.
Beside the output y forward gives U ``[T, W]`` and the interleaved factors ``[W, in]`` and ``[W, out]`` (``library``),
which backward may use again, where ``keep`` asks for them, and empty tensors otherwise. With a ``seed [1]`` the adapter
sees x with entries dropped at ``dropout_p``; the same seed drops the same entries in backward. ``active [G, S]`` is
False where a group uses no expert of a scale: the kernel there is zero, and so is its gradient, which a backend need
not compute. The backward ops have no derivative of their own: a second differentiation raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import run, run_backward, run_forward
from .gradients import delta_backward, delta_save, linear_backward, linear_save, weight_backward, weight_setup
from .library import Output

_library = torch.library.Library("ept", "DEF")

_library.define(
    "pyramid_weight(Tensor A, Tensor B, Tensor folded, int in_features, int out_features, int[] scales) -> Tensor"
)
_library.define(
    "pyramid_weight_backward(Tensor grad, Tensor A, Tensor B, Tensor folded, int[] scales, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define("pyramid_merge(Tensor weight, Tensor A, Tensor B, Tensor folded, int[] scales) -> Tensor")
_library.define(
    "pyramid_delta(Tensor x, Tensor A, Tensor B, Tensor folded, Tensor? groups, int out_features, int[] scales,"
    " float dropout_p=0.0, Tensor? seed=None, Tensor? active=None, bool keep=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "pyramid_delta_backward(Tensor grad, Tensor x, Tensor A, Tensor B, Tensor folded, Tensor? groups, int[] scales,"
    " bool[] needs, float dropout_p=0.0, Tensor? seed=None, Tensor? active=None, Tensor? U=None, Tensor? A_hat=None,"
    " Tensor? B_hat=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "pyramid_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor folded, Tensor? groups,"
    " int[] scales, float dropout_p=0.0, Tensor? seed=None, Tensor? active=None, bool keep=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "pyramid_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor folded, Tensor? groups,"
    " int[] scales, bool[] needs, float dropout_p=0.0, Tensor? seed=None, Tensor? active=None, Tensor? U=None,"
    " Tensor? A_hat=None, Tensor? B_hat=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _filled(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op cannot return None: an empty tensor stands for "not asked for"."""
    return tuple(like.new_empty(0) if part is None else part.contiguous() for part in results)


def _weight(*args):
    return run("pyramid_weight", *args).contiguous()


def _weight_backward(*args):
    return _filled(run("pyramid_weight_backward", *args), args[0])


def _delta(x, A, B, folded, groups, out_features, scales, dropout_p=0.0, seed=None, active=None, keep=False):
    arguments = (x, A, B, folded, groups, out_features, scales)
    output = run_forward("pyramid_delta", *arguments, dropout_p=dropout_p, seed=seed, active=active, keep=keep)
    return _filled(output, x)


def _linear(x, weight, bias, A, B, folded, groups, scales, dropout_p=0.0, seed=None, active=None, keep=False):
    arguments = (x, weight, bias, A, B, folded, groups, scales)
    output = run_forward("pyramid_linear", *arguments, dropout_p=dropout_p, seed=seed, active=active, keep=keep)
    return _filled(output, x)


def _backward(op: str, arguments: tuple, dropout_p=0.0, seed=None, active=None, *kept):
    kept = () if not kept or kept[0] is None else kept
    options = {"dropout_p": dropout_p, "seed": seed, "active": active, "kept": kept}
    return _filled(run_backward(op, *arguments, **options), arguments[0])


def _delta_backward(*args):
    return _backward("pyramid_delta_backward", args[:8], *args[8:])


def _linear_backward(*args):
    return _backward("pyramid_linear_backward", args[:9], *args[9:])


for _name, _kernel in {
    "pyramid_weight": _weight,
    "pyramid_weight_backward": _weight_backward,
    "pyramid_delta": _delta,
    "pyramid_delta_backward": _delta_backward,
    "pyramid_linear": _linear,
    "pyramid_linear_backward": _linear_backward,
}.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


def _merge(weight: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int]) -> Tensor:
    """Summed in fp32 or wider, rounded once."""
    factor_dtype = torch.promote_types(A.dtype, torch.float32)
    A, B, folded = (tensor.to(factor_dtype) for tensor in (A, B, folded))
    update = run("pyramid_weight", A, B, folded, weight.shape[1], weight.shape[0], scales)
    in_place = update.dtype == torch.promote_types(weight.dtype, update.dtype)
    total = update.add_(weight) if in_place else weight + update
    return total.to(weight.dtype).contiguous()


_library.impl("pyramid_merge", _merge, "CompositeExplicitAutograd")


@torch.library.register_fake("ept::pyramid_weight", lib=_library)
def _(A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]) -> Tensor:
    return A.new_empty(folded.shape[0], out_features, in_features)


@torch.library.register_fake("ept::pyramid_merge", lib=_library)
def _(weight, A, B, folded, scales) -> Tensor:
    return weight.new_empty(folded.shape[0], *weight.shape)


def _fake_output(x: Tensor, rank: int, out_features: int, scales: Sequence[int], keep: bool) -> tuple[Tensor, ...]:
    rows, columns = x.shape[0], rank * sum(scales)  # len(x) would be fixed when exported
    kept = ((rows, columns), (columns, x.shape[1]), (columns, out_features)) if keep else ((0,), (0,), (0,))
    return tuple(x.new_empty(shape) for shape in ((rows, out_features), *kept))


@torch.library.register_fake("ept::pyramid_delta", lib=_library)
def _(x, A, B, folded, groups, out_features, scales, dropout_p=0.0, seed=None, active=None, keep=False):
    return _fake_output(x, A.shape[0], out_features, scales, keep)


@torch.library.register_fake("ept::pyramid_linear", lib=_library)
def _(x, weight, bias, A, B, folded, groups, scales, dropout_p=0.0, seed=None, active=None, keep=False):
    return _fake_output(x, A.shape[0], weight.shape[0], scales, keep)


def _fake_gradients(grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    pairs = zip(inputs, needs, strict=True)
    return tuple(tensor.new_empty(tensor.shape) if need else grad.new_empty(0) for tensor, need in pairs)


@torch.library.register_fake("ept::pyramid_weight_backward", lib=_library)
def _(grad, A, B, folded, scales, needs):
    return _fake_gradients(grad, (A, B, folded), needs)


@torch.library.register_fake("ept::pyramid_delta_backward", lib=_library)
def _(
    grad, x, A, B, folded, groups, scales, needs, dropout_p=0.0, seed=None, active=None, U=None, A_hat=None, B_hat=None
):
    return _fake_gradients(grad, (x, A, B, folded), needs)


@torch.library.register_fake("ept::pyramid_linear_backward", lib=_library)
def _(
    grad,
    x,
    weight,
    A,
    B,
    folded,
    groups,
    scales,
    needs,
    dropout_p=0.0,
    seed=None,
    active=None,
    U=None,
    A_hat=None,
    B_hat=None,
):
    return _fake_gradients(grad, (x, A, B, folded), needs)


def _refuse(ctx, *grads):
    raise RuntimeError("the ept ops can be differentiated once; their gradients have no derivative of their own")


def _refuse_merge(ctx, grad):
    raise RuntimeError("a merged weight has no gradient: pyramid_merge serves inference; train through pyramid_weight")


def _setup(save):
    """``save`` for ``torch.library``: what is kept is among the outputs, empty where it is not."""

    def setup(ctx, inputs, output) -> None:
        *arguments, keep = inputs
        save(ctx, tuple(arguments), Output(*output) if keep else Output(output[0]))

    return setup


for _op in ("pyramid_weight", "pyramid_delta", "pyramid_linear"):
    torch.library.register_autograd(f"ept::{_op}_backward", _refuse, lib=_library)
torch.library.register_autograd("ept::pyramid_merge", _refuse_merge, lib=_library)
torch.library.register_autograd("ept::pyramid_weight", weight_backward, setup_context=weight_setup, lib=_library)
torch.library.register_autograd("ept::pyramid_delta", delta_backward, setup_context=_setup(delta_save), lib=_library)
torch.library.register_autograd("ept::pyramid_linear", linear_backward, setup_context=_setup(linear_save), lib=_library)
