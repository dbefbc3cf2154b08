"""The public functions: validate, flatten rows, follow autocast, call the op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import backend_for
from .folding import find_or_keep, fold_by, folder_of
from .geometry import PyramidGeometry
from .ops import Routed, run, run_routed
from .problem import Base, Kept, Problem, Routing
from .tracing import autocast_dtype, constant_in_graphs, is_eager, without_autocast

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_IDS = frozenset((torch.int64, torch.int32))
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_layout, _dtype, _device, _shape = map(attrgetter, ("layout", "dtype", "device", "shape"))


def _are_sound(floats: dict[str, Tensor | None], groups: Tensor | None, active: Tensor | None) -> bool:
    """Whether all is as ``_check_tensors`` wants it. By ``map``: a small layer would notice a loop."""
    numbers = [tensor for name, tensor in floats.items() if tensor is not None or name != "bias"]
    tensors = numbers + [tensor for tensor in (groups, active) if tensor is not None]
    return (
        _PLAIN.issuperset(map(type, tensors))
        and {*map(_layout, tensors)} == {torch.strided}
        and _FLOATS.issuperset(map(_dtype, numbers))
        and len({*map(_device, tensors)}) == 1
    )


def _check_tensors(
    geometry: PyramidGeometry, groups: Tensor | None, active: Tensor | None, **floats: Tensor | None
) -> None:
    """What backends take on trust: dense tensors on one device, numbers in a dtype that they compute in."""
    if not isinstance(geometry, PyramidGeometry):
        raise TypeError(f"geometry must be a PyramidGeometry, got {type(geometry).__name__}")
    if not torch.compiler.is_compiling() and _are_sound(floats, groups, active):
        return
    device = None
    for name, tensor in (*floats.items(), ("groups", groups), ("active", active)):
        if tensor is None and name in ("bias", "groups", "active"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")
        if name in floats and tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}; allowed: 16 to 64 bits")
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{name} must be on the device of {first}, {device}, got {tensor.device}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {meaning} {list(shape)}, got {list(tensor.shape)}")


def _check_adapter(A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> None:
    _expect("A", A, (geometry.rank, geometry.seed_width), "[r, ceil(in / k_min)] =")
    _expect("B", B, (geometry.seed_height, geometry.rank), "[ceil(out / k_min), r] =")
    if folded.dim() != 2 or folded.shape[1] != geometry.folded_size:
        raise ValueError(f"folded must be [groups, {geometry.folded_size}], got {list(folded.shape)}")
    if A.dtype != B.dtype:
        raise ValueError(f"A and B must have one dtype, got {A.dtype} and {B.dtype}")


def _check_rows(x: Tensor, folded: Tensor, groups: Tensor | None, geometry: PyramidGeometry) -> None:
    if x.dim() == 0 or x.shape[-1] != geometry.in_features:
        raise ValueError(f"x must be [..., in_features={geometry.in_features}], got {list(x.shape)}")
    if groups is None:
        if folded.shape[0] != 1:
            raise ValueError(f"groups may be None only for one folded kernel, got {folded.shape[0]} of them")
        return
    if groups.dim() != 1 or groups.dtype not in _IDS:
        raise ValueError(f"groups must be a 1-D tensor of int64 or int32, got {list(groups.shape)} of {groups.dtype}")
    rows, count = math.prod(x.shape[:-1]), groups.shape[0]  # Size.numel() is fixed when exported
    if rows and not folded.shape[0]:
        raise ValueError(f"folded must hold a kernel for the {rows} rows of x, got {list(folded.shape)}")
    if rows % count if count else rows:
        raise ValueError(f"groups must have a length that divides the {rows} rows of x, got {count}")


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Below autograd the ops would drop a tangent without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("the ept ops have no forward-mode derivative (torch.autograd.forward_ad, jvp)")


def _check_options(dropout_p: float, active: Tensor | None, folded: Tensor, geometry: PyramidGeometry) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    if active is not None:
        _expect("active", active, (folded.shape[0], len(geometry.scales)), "[groups, scales] =")
        if active.dtype != torch.bool:
            raise ValueError(f"active must be a bool tensor, got {active.dtype}")


def _check_problem(problem: Problem, geometry: PyramidGeometry) -> None:
    x, A, B, folded, groups, active, *_ = problem
    _check_adapter(A, B, folded, geometry)
    _check_rows(x, folded, groups, geometry)
    _check_options(problem.dropout_p, active, folded, geometry)
    _refuse_tangents(x, A, B, folded)


def _check_base(weight: Tensor, bias: Tensor | None, geometry: PyramidGeometry) -> None:
    _expect("weight", weight, (geometry.out_features, geometry.in_features), "[out, in] =")
    if bias is not None:
        _expect("bias", bias, (geometry.out_features,), "[out] =")


def _check_base_dtype(base: Base, x: Tensor) -> None:
    for name, tensor in zip(Base._fields, base, strict=True):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")


@constant_in_graphs
def _fuses_dropout(device: torch.device, dtype: torch.dtype) -> bool:
    return backend_for(device, dtype).fuses_dropout


def _dropout_seed(x: Tensor) -> Tensor:
    """``[1]`` int64 from torch's generator on the device of x, so that recomputation replays the mask; no host read."""
    return torch.randint(2**62, (1,), device=x.device)


def _cast(base: Base | None, dtype: torch.dtype) -> Base | None:
    return None if base is None else Base(base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))


def _apply(problem: Problem, base: Base | None, kept: Kept | None) -> Tensor:
    """The op on x ``[..., in]``: autocast, dropout, rows."""
    x, A, B, folded, groups, active, out_features, scales, dropout_p, _ = problem
    dtype = autocast_dtype(x)
    if dtype is not None:
        with without_autocast(x.device):
            x = x.to(dtype)
            adapter = (A, B, folded, groups, active, out_features, scales, dropout_p)
            return _apply(Problem(x, *adapter), _cast(base, dtype), kept)
    if base is not None:
        _check_base_dtype(base, x)
    seed = None
    if dropout_p > 0:
        if _fuses_dropout(x.device, x.dtype):
            seed = _dropout_seed(x)
        else:
            dropped = Problem(F.dropout(x, dropout_p), A, B, folded, groups, active, out_features, scales)
            delta = _apply(dropped, None, kept)
            return delta if base is None else F.linear(x, base.weight, base.bias) + delta
    rows = x.reshape(-1, x.shape[-1])
    y = run(Problem(rows, A, B, folded, groups, active, out_features, scales, dropout_p, seed), base, kept)
    return y.view(*x.shape[:-1], out_features)


def pyramid_weight(A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> Tensor:
    """Dense update of every group, ``sum_k crop((B_k A_k) kron Kbar_k[g])`` (spec identity 5).

    Args:
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``, one floating dtype.
        folded: ``[G, folded_size]``, packed as ``fold_kernels`` packs.
        geometry: the layer's sizes.

    Returns:
        ``[G, out, in]`` in the dtype of A, differentiable once in A, B and folded.

    Raises:
        ValueError: a shape or dtype that does not fit the geometry, tensors on several devices or not dense.
        TypeError: neither a tensor nor a geometry.
    """
    _check_tensors(geometry, None, None, A=A, B=B, folded=folded)
    _check_adapter(A, B, folded, geometry)
    _refuse_tangents(A, B, folded)
    with without_autocast(A.device):  # a merge is exact in the dtype of A, whatever surrounds it
        return torch.ops.ept.pyramid_weight(
            A, B, folded, geometry.in_features, geometry.out_features, list(geometry.scales)
        )


def pyramid_merge(weight: Tensor, A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> Tensor:
    """A base weight with each group's update added, ``W0 + sum_k crop((B_k A_k) kron Kbar_k[g])`` (spec identity 5).

    For inference: there is no gradient. ``weight + pyramid_weight(...)`` has one.

    Args:
        weight: ``[out, in]``, any floating dtype and strides; it is read, never written.
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``, one floating dtype.
        folded: ``[G, folded_size]``, packed as ``fold_kernels`` packs.
        geometry: the layer's sizes.

    Returns:
        ``[G, out, in]`` in the dtype of weight: summed in fp32 or wider, rounded once.

    Raises:
        ValueError: a shape or dtype that does not fit the geometry, tensors on several devices or not dense.
        TypeError: neither a tensor nor a geometry.
        RuntimeError: an input requires a gradient and autograd is on.
    """
    _check_tensors(geometry, None, None, weight=weight, A=A, B=B, folded=folded)
    _check_adapter(A, B, folded, geometry)
    _expect("weight", weight, (geometry.out_features, geometry.in_features), "[out, in] =")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, A, B, folded)):
        raise RuntimeError(
            "pyramid_merge has no gradient; call it under torch.no_grad(), or add pyramid_weight to the weight"
        )
    with without_autocast(weight.device):
        return torch.ops.ept.pyramid_merge(weight, A, B, folded, list(geometry.scales))


def pyramid_delta(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    geometry: PyramidGeometry,
    *,
    dropout_p: float = 0.0,
    active: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """The adapter's output for any base layer (spec section 2): ``sum_k B_k (A_k X) Kbar_k[g]^T``.

    Args:
        x: ``[..., in]``, any floating dtype; rows are its leading dimensions in row-major order.
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``; fp32 beside half inputs is usual.
        folded: ``[G, folded_size]``, packed as ``fold_kernels`` packs, already holding ``alpha / r``, ALP and gates.
        groups: ``[N]`` rows of ``folded``, one for every ``T / N`` consecutive rows of x (N = 1, the batch, or T); None
            with G = 1.
        geometry: the layer's sizes.
        dropout_p: probability with which an entry of x is zero, in [0, 1); the others are divided by 1 - p. Drawn from
            torch's generator.
        active: ``[G, S]`` bool, whether a group uses an expert of each of ``geometry.scales``; None: whether it does is
            not known. Where False, the kernel in ``folded`` must be zero; its gradient is zero then, and not computed.
        kept: of a layer, for calls without gradients on a GPU: what follows from A, B and folded is kept there until
            one of them changes (``Stamp``).

    Returns:
        ``[..., out]`` in the dtype of x (autocast's, where that is on), differentiable once in x, A, B and folded.

    Raises:
        ValueError: a shape or dtype that does not fit, tensors on several devices or not dense, groups that do not
            divide the rows, dropout_p out of range.
        TypeError: neither a tensor nor a geometry.
        IndexError: on a CPU, a group that ``folded`` lacks; on a GPU the backend's device assertion, where it has one.
    """
    _check_tensors(geometry, groups, active, x=x, A=A, B=B, folded=folded)
    problem = Problem(x, A, B, folded, groups, active, geometry.out_features, geometry.scales, dropout_p)
    _check_problem(problem, geometry)
    return _apply(problem, None, kept)


def pyramid_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    geometry: PyramidGeometry,
    *,
    dropout_p: float = 0.0,
    active: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` and the adapter's output in one call; the rest as in ``pyramid_delta``.

    Dropout acts on what the adapter sees, not on the base product.

    Args:
        weight: ``[out, in]`` in the dtype of x. bias: ``[out]`` or None.

    Returns:
        ``[..., out]`` in the dtype of x (autocast's, where that is on).

    Raises:
        ValueError: as ``pyramid_delta``, and a weight or bias of another shape or dtype.
    """
    _check_tensors(geometry, groups, active, x=x, weight=weight, bias=bias, A=A, B=B, folded=folded)
    problem = Problem(x, A, B, folded, groups, active, geometry.out_features, geometry.scales, dropout_p)
    _check_problem(problem, geometry)
    _refuse_tangents(weight, bias)
    _check_base(weight, bias, geometry)
    return _apply(problem, Base(weight, bias), kept)


# --- folded kernels of tasks ------------------------------------------------------------------------------------------


def _check_tasks(tasks: int | Tensor | None) -> None:
    """Ids that native code would read as others: truth values, fractions, numbers of numpy."""
    if isinstance(tasks, Tensor):
        if tasks.is_meta:
            raise ValueError("tasks must hold ids, got a tensor on the meta device, which holds nothing")
        if tasks.dtype not in _IDS or tasks.dim() > 1:
            raise ValueError(
                f"tasks must be a scalar or 1-D tensor of int64 or int32, got {list(tasks.shape)} of {tasks.dtype}"
            )
    elif tasks is not None and (isinstance(tasks, bool) or not isinstance(tasks, int)):
        raise TypeError(f"tasks must be an integer, an integer tensor or None, got {tasks!r}")


def _check_routing(routing: Routing) -> None:
    """What native code takes on trust."""
    gate, table, _, kernels, top_k, scaling, geometry = routing
    if not isinstance(geometry, PyramidGeometry):
        raise TypeError(f"geometry must be a PyramidGeometry, got {type(geometry).__name__}")
    for place, tensor in enumerate(routing.parameters):
        if not isinstance(tensor, Tensor):
            name = ("gate", "table", "every entry of kernels")[min(place, 2)]
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    sizes = geometry.kernel_sizes
    if gate.dim() != 2 or gate.shape[0] != len(sizes):
        raise ValueError(f"gate must be [{len(sizes)} experts, d], got {list(gate.shape)}")
    if table.dim() != 2 or table.shape[1] != gate.shape[1]:
        raise ValueError(f"table must be [tasks, d={gate.shape[1]}], got {list(table.shape)}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= len(sizes):
        raise ValueError(f"top_k must be from 1 to {len(sizes)}, got {top_k!r}")
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number, got {scaling!r}")
    if [kernel.shape for kernel in kernels] != [(k, k) for k in sizes]:
        raise ValueError(f"kernels must be [k, k] with k in {sizes}, got {[list(kernel.shape) for kernel in kernels]}")


def fold_tasks(
    gate: Tensor,
    table: Tensor,
    tasks: int | Tensor | None,
    kernels: Sequence[Tensor],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> tuple[Tensor, Tensor] | None:
    """``(folded [G, folded_size], active [G, S] bool)`` by the backend that serves, or None where it cannot.

    It can with fp32 parameters that are contiguous and on one device, where nothing traces or transforms what happens
    to them (``is_eager``). Otherwise the caller composes a router, ``fold_kernels`` and ``active_scales``.

    Args:
        gate: ``[E, d]``. table: ``[T, d]``, the task embeddings.
        tasks: a row of the table; ``[G]`` int64 rows on its device; or None, all rows in order.
        kernels: one ``[k_e, k_e]`` per expert, in the order of ``geometry.kernel_sizes``.
        top_k: experts that a task selects, 1 to E. scaling: ``alpha / r``.

    Raises:
        IndexError: a task that the table lacks; for a tensor on a GPU the result is NaN instead.
        ValueError: a shape that does not fit the geometry, top_k out of range, tasks of another shape or dtype.
        TypeError: another type than these.
        ValueError, RuntimeError: as ``backend_for``.
    """
    _check_tasks(tasks)
    routing = Routing(gate, table, tasks, tuple(kernels), top_k, scaling, geometry)
    _check_routing(routing)
    folder = folder_of(routing)
    return None if folder is None else fold_by(folder, routing)


def fold_kept(
    kept: Kept,
    kept_table: Kept,
    gate: Tensor,
    table: Tensor,
    tasks: int | Tensor | None,
    kernels: Sequence[Tensor],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """``(folded [G, folded_size], groups [N] or None, active [G, S])`` for the ops, from ``kept`` where it still holds.

    None where nothing is kept: gradients are on, something traces or transforms the call (``is_eager``) or captures it
    in a CUDA graph, ``fold_tasks`` would give None, or there are very many tasks. The tensors serve later calls, too:
    they are to be read only.

    Args:
        kept: this layer's. kept_table: the table's, for all layers that share it.
        gate, table, kernels, top_k, scaling, geometry: as ``fold_tasks``.
        tasks: a row of the table, for G = 1; scalar or ``[N]`` integer rows, which become ``groups`` of all T tasks;
            None, all T without ``groups``.

    Raises:
        IndexError, ValueError, TypeError, RuntimeError: as ``fold_tasks``.
    """
    _check_tasks(tasks)
    if not is_eager() or torch.is_grad_enabled():
        return None
    routing = Routing(gate, table, tasks, tuple(kernels), top_k, scaling, geometry)
    _check_routing(routing)
    return None if folder_of(routing) is None else find_or_keep(routing, kept, kept_table)


# --- both in one call -------------------------------------------------------------------------------------------------


class LayerKept(NamedTuple):
    """Where a layer keeps what follows from its parameters between calls that train nothing."""

    fold: Kept
    table: Kept
    factors: Kept


def _suits(x: Tensor, base: Base | None, factors: tuple[Tensor, Tensor], routing: Routing) -> bool:
    """Whether a call is one that ``routed_linear`` takes. Few steps: a small layer would notice more."""
    gate, table, tasks, kernels, *_, g = routing
    trained = [*factors, gate, table, *kernels]
    tensors = [x, *trained] if base is None else [x, *base, *trained]
    if not is_eager(*tensors) or autocast_dtype(x) is not None:
        return False
    device, dtype = x.device, x.dtype
    everything = [tensor for tensor in tensors if tensor is not None]
    if {*map(_layout, everything)} != {torch.strided} or {*map(_device, everything)} != {device}:
        return False
    if {*map(_dtype, trained)} != {torch.float32} or not all(map(Tensor.is_contiguous, trained)):
        return False
    if x.dim() == 0 or x.shape[-1] != g.in_features or dtype not in _FLOATS:
        return False
    shapes = [*map(_shape, trained)]
    if shapes != [*g.factor_shapes, (len(kernels), table.shape[-1]), table.shape, *g.kernel_shapes]:
        return False
    if base is not None:
        weight, bias = base
        if weight.dtype != dtype or weight.shape != (g.out_features, g.in_features):
            return False
        if bias is not None and (bias.dtype != dtype or bias.shape != (g.out_features,)):
            return False
    if isinstance(tasks, Tensor):
        if tasks.device != device or tasks.dtype not in _IDS or tasks.dim() > 1:
            return False
        count = tasks.numel()
        return count > 0 and x.numel() // g.in_features % count == 0
    return True


def routed_linear(
    x: Tensor,
    base: Base | None,
    factors: tuple[Tensor, Tensor],
    routing: Routing,
    dropout_p: float = 0.0,
    kept: LayerKept | None = None,
) -> Tensor | None:
    """``pyramid_linear``, or ``pyramid_delta`` without a base, that folds in the same call and node of autograd.

    None wherever a call is not the usual one: something traces or transforms it, autocast is on, no backend folds
    (``fold_tasks``), or an argument is wrong. The caller folds and calls ``pyramid_linear``, which says what is wrong.

    Args:
        x: ``[..., in]``. factors: A and B.
        routing: tasks are those of the call: one row of the table, or one for each equal run of rows of x.
        kept: for calls without gradients outside training.

    Raises:
        IndexError: as ``fold_tasks``.
    """
    if not _suits(x, base, factors, routing):
        return None
    gate, table, tasks, *_, g = routing
    folder = backend_for(x.device, torch.float32).folder
    if folder is None or gate.shape[0] > folder.most_experts:
        return None
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, g.in_features)
    backend = backend_for(x.device, x.dtype)
    if kept is not None and not torch.is_grad_enabled():
        found = find_or_keep(routing, kept.fold, kept.table)
        if found is not None:
            folded, groups, active = found
            problem = Problem(rows, *factors, folded, groups, active, g.out_features, g.scales)
            y = backend.forward(problem, base, False, kept.factors if x.is_cuda else None).y.contiguous()
            return y if flat else y.view(*x.shape[:-1], g.out_features)
    groups = None
    if isinstance(tasks, Tensor) and tasks.dim():
        count, device = len(tasks), tasks.device
        if count > len(table):  # every task once
            groups, routing = tasks, routing._replace(tasks=None)
        elif count > 1:
            groups = torch.arange(count, device=device)
    seed = None
    if dropout_p > 0:
        if not backend.fuses_dropout:
            call = Routed(backend, folder, routing, groups)
            y = run_routed(call, F.dropout(rows, dropout_p), None, *factors)
            y = y if flat else y.view(*x.shape[:-1], g.out_features)
            return y if base is None else F.linear(x, *base) + y
        seed = _dropout_seed(x)
    y = run_routed(Routed(backend, folder, routing, groups, dropout_p, seed), rows, base, *factors)
    return y if flat else y.view(*x.shape[:-1], g.out_features)
