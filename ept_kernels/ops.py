"""The ops on rows: schemas, fakes, autograd, and the short cut that eager code takes instead.

Rows are 2-D here; ``functional`` validates, flattens and handles autocast, and ``problem.Problem`` says what the
arguments are. Beside the output y forward gives U ``[T, W]`` and the interleaved factors ``[W, in]`` and ``[W, out]``
(``backends.gpu``), which backward may use again, where ``keep`` asks for them, and empty tensors otherwise. The
backward ops have no derivative of their own: a second differentiation raises.

``torch.library`` takes about a hundred microseconds for a call with autograd and its backward, several times a small
layer's own work; ``torch.autograd.Function`` takes a tenth. Compilers and everything else that must see ops get the
library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import backend_for, recomputes, saves_for_backward
from .folding import save_routing, saved_routing
from .problem import Backend, Base, Folded, Folder, Kept, Output, Problem, Routing
from .tracing import apply_eagerly, constant_in_graphs, is_eager, refuse_batched

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


# --- the ops' arguments, and what backends take -----------------------------------------------------------------------

#: Of the last arguments, which torch leaves out where they have these values: dropout_p, seed, active, keep.
_DEFAULTS: tuple[Any, ...] = (0.0, None, None, False)


def _delta_call(args: Sequence[Any]) -> tuple[Problem, None, bool]:
    """The arguments of ``pyramid_delta`` as a backend takes them, and ``keep``."""
    x, A, B, folded, groups, out_features, scales, *options = args
    dropout_p, seed, active, keep = [*options, *_DEFAULTS[len(options) :]]
    return Problem(x, A, B, folded, groups, active, out_features, scales, dropout_p, seed), None, keep


def _linear_call(args: Sequence[Any]) -> tuple[Problem, Base, bool]:
    x, weight, bias, A, B, folded, groups, *options = args
    problem, _, keep = _delta_call((x, A, B, folded, groups, weight.shape[0], *options))
    return problem, Base(weight, bias), keep


def _backward_call(grad: Tensor, args: Sequence[Any]) -> tuple[Problem, Sequence[bool], tuple[Tensor, ...]]:
    """The arguments of ``pyramid_delta_backward`` after ``grad``: the problem, ``needs`` and what forward saved."""
    x, A, B, folded, groups, scales, needs, *options = args
    dropout_p, seed, active, *saved = [*options, *_DEFAULTS[len(options) : 3]]
    problem = Problem(x, A, B, folded, groups, active, grad.shape[1], scales, dropout_p, seed)
    return problem, needs, tuple(tensor for tensor in saved if tensor is not None)


def _filled(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op cannot return None: an empty tensor stands for "not asked for"."""
    return tuple(like.new_empty(0) if part is None else part.contiguous() for part in results)


# --- implementations --------------------------------------------------------------------------------------------------


def _backend(tensor: Tensor) -> Backend:
    return backend_for(tensor.device, tensor.dtype)


def _forward(problem: Problem, base: Base | None, keep: bool) -> tuple[Tensor, ...]:
    return _filled(_backend(problem.x).forward(problem, base, keep), problem.x)


def _backward(grad: Tensor, args: Sequence[Any], weight: Tensor | None = None) -> tuple[Tensor, ...]:
    problem, needs, saved = _backward_call(grad, args)
    return _filled(_backend(grad).backward(grad, problem, weight, needs, saved), grad)


def _merge(weight: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int]) -> Tensor:
    """Summed in fp32 or wider, rounded once."""
    factor_dtype = torch.promote_types(A.dtype, torch.float32)
    A, B, folded = (tensor.to(factor_dtype) for tensor in (A, B, folded))
    update = _backend(A).delta_weight(A, B, folded, weight.shape[1], weight.shape[0], scales)
    in_place = update.dtype == torch.promote_types(weight.dtype, update.dtype)
    total = update.add_(weight) if in_place else weight + update
    return total.to(weight.dtype).contiguous()


_KERNELS = {
    "pyramid_weight": lambda A, *args: _backend(A).delta_weight(A, *args).contiguous(),
    "pyramid_weight_backward": lambda grad, *args: _filled(_backend(grad).delta_weight_backward(grad, *args), grad),
    "pyramid_merge": _merge,
    "pyramid_delta": lambda *args: _forward(*_delta_call(args)),
    "pyramid_delta_backward": lambda grad, *args: _backward(grad, args),
    "pyramid_linear": lambda *args: _forward(*_linear_call(args)),
    "pyramid_linear_backward": lambda grad, x, weight, *args: _backward(grad, (x, *args), weight),
}

for _name, _kernel in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


# --- shapes -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("ept::pyramid_weight", lib=_library)
def _(A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]) -> Tensor:
    return A.new_empty(folded.shape[0], out_features, in_features)


@torch.library.register_fake("ept::pyramid_merge", lib=_library)
def _(weight: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int]) -> Tensor:
    return weight.new_empty(folded.shape[0], *weight.shape)


def _fake_output(problem: Problem, base: Base | None, keep: bool) -> tuple[Tensor, ...]:
    (rows, in_features), columns = problem.x.shape, problem.A.shape[0] * sum(problem.scales)
    kept = ((rows, columns), (columns, in_features), (columns, problem.out_features)) if keep else ((0,), (0,), (0,))
    return tuple(problem.x.new_empty(shape) for shape in ((rows, problem.out_features), *kept))


def _fake_gradients(grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    pairs = zip(inputs, needs, strict=True)
    return tuple(tensor.new_empty(tensor.shape) if need else grad.new_empty(0) for tensor, need in pairs)


def _fake_backward(grad: Tensor, args: Sequence[Any]) -> tuple[Tensor, ...]:
    problem, needs, _ = _backward_call(grad, args)
    return _fake_gradients(grad, problem[:4], needs)


_FAKES = {
    "pyramid_delta": lambda *args: _fake_output(*_delta_call(args)),
    "pyramid_linear": lambda *args: _fake_output(*_linear_call(args)),
    "pyramid_weight_backward": lambda grad, A, B, folded, scales, needs: _fake_gradients(grad, (A, B, folded), needs),
    "pyramid_delta_backward": lambda grad, *args: _fake_backward(grad, args),
    "pyramid_linear_backward": lambda grad, x, weight, *args: _fake_backward(grad, (x, *args)),
}

for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"ept::{_name}", _fake, lib=_library)


# --- autograd, for the library's ops and for eager code ---------------------------------------------------------------


def _runs_directly(*tensors: Tensor | None) -> bool:
    """Whether a backward may skip torch's dispatcher. With gradients on, the op refuses a second derivative."""
    return not torch.is_grad_enabled() and is_eager(*tensors)


def _asked(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _tensors(problem: Problem, base: Base | None, output: Output) -> tuple[Tensor | None, ...]:
    """What the backward reads; ``ctx.sizes`` holds the rest."""
    x, A, B, folded, groups, active, *_, seed = problem
    weight = None if base is None else base.weight
    return x, A, B, folded, groups, active, seed, weight, *(t for t in output[1:] if t is not None)


def _save(ctx: Any, problem: Problem, base: Base | None, output: Output) -> None:
    ctx.sizes = problem[6:9]
    ctx.save_for_backward(*_tensors(problem, base, output))


def _gradients(ctx: Any, tensors: Sequence[Any], grad: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Of x, A, B and folded, where ``tensors`` are those of ``_tensors``."""
    x, A, B, folded, groups, active, seed, weight, *saved = tensors
    out_features, scales, dropout_p = ctx.sizes
    if _runs_directly(grad, *tensors):
        problem = Problem(x, A, B, folded, groups, active, out_features, scales, dropout_p, seed)
        return _asked(_backend(grad).backward(grad, problem, weight, needs, saved), needs)
    tail = (A, B, folded, groups, list(scales), needs, dropout_p, seed, active, *saved)
    if weight is None:
        return _asked(torch.ops.ept.pyramid_delta_backward(grad, x, *tail), needs)
    return _asked(torch.ops.ept.pyramid_linear_backward(grad, x, weight, *tail), needs)


def _base_gradients(grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias. The base is frozen in EPT, but an op must not drop a gradient that somebody asks for."""
    need_weight, need_bias = needs
    return grad.T @ x if need_weight else None, grad.sum(0) if need_bias else None


def _delta_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    return *_gradients(ctx, ctx.saved_tensors, grad, needs[:4]), *[None] * (len(needs) - 4)


def _linear_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_bias, *need_adapter = ctx.needs_input_grad[:6]
    tensors = ctx.saved_tensors  # to be read once: checkpointing recomputes for each reading
    grad_x, *grad_adapter = _gradients(ctx, tensors, grad, [need_x, *need_adapter])
    of_base = _base_gradients(grad, tensors[0], (need_weight, need_bias))
    return grad_x, *of_base, *grad_adapter, *[None] * (len(ctx.needs_input_grad) - 6)


def _setup(ctx: Any, call: tuple[Problem, Base | None, bool], output: tuple[Tensor, ...]) -> None:
    """What is kept is among the outputs, empty where it is not."""
    problem, base, keep = call
    _save(ctx, problem, base, Output(*output) if keep else Output(output[0]))


def _delta_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, _delta_call(inputs), output)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, _linear_call(inputs), output)


def _weight_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    A, B, folded, _, _, ctx.scales = inputs
    ctx.save_for_backward(A, B, folded)


def _weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    tensors = ctx.saved_tensors
    arguments = (grad, *tensors, ctx.scales, needs)
    if _runs_directly(grad, *tensors):
        gradients = _backend(grad).delta_weight_backward(*arguments)
    else:
        gradients = torch.ops.ept.pyramid_weight_backward(*arguments)
    return *_asked(gradients, needs), None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the ept ops can be differentiated once; their gradients have no derivative of their own")


def _refuse_merge(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("a merged weight has no gradient: pyramid_merge serves inference; train through pyramid_weight")


for _name in ("pyramid_weight", "pyramid_delta", "pyramid_linear"):
    torch.library.register_autograd(f"ept::{_name}_backward", _refuse, lib=_library)
torch.library.register_autograd("ept::pyramid_merge", _refuse_merge, lib=_library)
torch.library.register_autograd("ept::pyramid_weight", _weight_backward, setup_context=_weight_setup, lib=_library)
torch.library.register_autograd("ept::pyramid_delta", _delta_backward, setup_context=_delta_setup, lib=_library)
torch.library.register_autograd("ept::pyramid_linear", _linear_backward, setup_context=_linear_setup, lib=_library)


# --- eager code -------------------------------------------------------------------------------------------------------


class _Rows(torch.autograd.Function):
    """``pyramid_delta``, or ``pyramid_linear`` where there is a weight. ``plan``: ``Problem`` after active."""

    @staticmethod
    def forward(ctx: Any, plan: tuple[Any, ...], *args: Any) -> Tensor:
        x, weight, bias, A, B, folded, groups, active = args
        problem = Problem(x, A, B, folded, groups, active, *plan)
        base = None if weight is None else Base(weight, bias)
        output = _backend(x).forward(problem, base, not recomputes())
        _save(ctx, problem, base, output)
        return output.y.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, need_x, need_weight, need_bias, *needs = ctx.needs_input_grad[:7]
        tensors = ctx.saved_tensors
        grad_x, *grad_adapter = _gradients(ctx, tensors, grad, [need_x, *needs])
        of_base = _base_gradients(grad, tensors[0], (need_weight, need_bias))
        return None, grad_x, *of_base, *grad_adapter, None, None


class Routed(NamedTuple):
    """A call whose kernels are folded in it: rows of ``Problem`` without ``folded`` and ``active``."""

    backend: Backend
    folder: Folder
    routing: Routing
    groups: Tensor | None
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def problem(self, x: Tensor, A: Tensor, B: Tensor, fold: Folded) -> Problem:
        geometry = self.routing.geometry
        sizes = (geometry.out_features, geometry.scales, self.dropout_p, self.seed)
        return Problem(x, A, B, fold.folded, self.groups, fold.active, *sizes)


class _RoutedRows(torch.autograd.Function):
    """``_Rows`` and the fold in one node."""

    @staticmethod
    def forward(ctx: Any, call: Routed, *args: Any) -> Tensor:
        x, weight, bias, A, B = args[:5]
        fold = call.folder.fold(call.routing, True)
        problem = call.problem(x, A, B, fold)
        base = None if weight is None else Base(weight, bias)
        output = call.backend.forward(problem, base, call.backend.keeps and not recomputes())
        ctx.folder, ctx.sizes = call.folder, problem[6:9]
        save_routing(ctx, call.routing, fold, *_tensors(problem, base, output))
        return output.y.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, need_x, need_weight, need_bias, need_A, need_B, *need_routing = ctx.needs_input_grad
        need_folded, tensors = any(need_routing), ctx.saved_tensors
        if need_folded:
            refuse_batched(grad)
        routing, others, saved = saved_routing(ctx, tensors)
        needs = [need_x, need_A, need_B, need_folded]
        grad_x, grad_A, grad_B, grad_folded = _gradients(ctx, others, grad, needs)
        of_base = _base_gradients(grad, others[0], (need_weight, need_bias))
        of_routing: Sequence[Tensor | None] = [None] * len(need_routing)
        if grad_folded is not None:
            of_routing = ctx.folder.fold_backward(routing, grad_folded, saved, need_routing)
        return None, grad_x, *of_base, grad_A, grad_B, *of_routing


def run_routed(call: Routed, x: Tensor, base: Base | None, A: Tensor, B: Tensor) -> Tensor:
    """y of eager code, from a routing instead of folded kernels."""
    weight, bias = (None, None) if base is None else base
    if torch.is_grad_enabled():
        return apply_eagerly(_RoutedRows, call, x, weight, bias, A, B, *call.routing.parameters)
    problem = call.problem(x, A, B, call.folder.fold(call.routing, False))
    return call.backend.forward(problem, base).y.contiguous()


# Read once while a graph is traced: the choice is the graph's.
_saves_in_graph = constant_in_graphs(saves_for_backward)


def run(problem: Problem, base: Base | None, kept: Kept | None = None) -> Tensor:
    """y of ``torch.ops.ept.pyramid_delta`` or, with a base, ``pyramid_linear``, by the shortest path to that result.

    ``kept``: where inference keeps what follows from parameters alone. On a GPU only: elsewhere it would save little.
    """
    x, A, B, folded, groups, active, out_features, scales, dropout_p, seed = problem
    weight, bias = (None, None) if base is None else base
    tensors = (x, A, B, folded, weight, bias)
    trains = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if not is_eager(*tensors, groups, active):
        keep = trains and _saves_in_graph(x.device, x.dtype)
        options = (list(scales), dropout_p, seed, active, keep)
        if base is None:
            return torch.ops.ept.pyramid_delta(x, A, B, folded, groups, out_features, *options)[0]
        return torch.ops.ept.pyramid_linear(x, weight, bias, A, B, folded, groups, *options)[0]
    if trains:
        plan = (out_features, scales, dropout_p, seed)
        return apply_eagerly(_Rows, plan, x, weight, bias, A, B, folded, groups, active)
    return _backend(x).forward(problem, base, False, kept if x.is_cuda else None).y.contiguous()
