"""Folded kernels: experts of the same scale become one kernel per scale, before any large tensor is touched.

``fold_kernels`` does it by tensor operations. Where a backend can, ``fold`` routes tasks and folds in one native call,
and ``fold_kept`` keeps what comes of it between calls that train nothing, until a parameter changes. On a CPU native
code compares the parameters' bits: gate, kernels and the embeddings asked for, some tens of kilobytes, which folding
would read as well; so no way of changing a parameter passes it by. On a GPU PyTorch's version counters tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import backend_for
from .geometry import PyramidGeometry
from .problem import Folded, Folder, Kept, Mark, Routing
from .tracing import apply_eagerly, is_eager, refuse_batched

#: Up to so many groups, which are tasks, a group's result is bit-identical however many there are: a task's output
#: stays the same when others are added. A matrix product, whose order of rounding depends on its number of rows, is
#: left to larger numbers of groups, which are tokens.
MOST_TASKS = 1024


def _by_scale(geometry: PyramidGeometry) -> list[int]:
    """The experts, those of the smallest scale first."""
    return sorted(range(geometry.num_experts), key=geometry.kernel_sizes.__getitem__)


def _split(gates: Tensor, geometry: PyramidGeometry) -> Sequence[Tensor]:
    """The columns of ``gates [G, E]``, scale by scale."""
    by_scale = _by_scale(geometry)
    if by_scale != list(range(len(by_scale))):
        columns = gates.unbind(1)
        gates = torch.stack([columns[expert] for expert in by_scale], dim=1)
    return gates.split(geometry.experts_per_scale, 1)


def fold_kernels(kernels: Sequence[Tensor], gates: Tensor, scaling: float, geometry: PyramidGeometry) -> Tensor:
    """``Kbar_k[g] = scaling * s_k * sum_{e: k_e = k} gates[g, e] K_e``, packed scale after scale (spec identity 2).

    Args:
        kernels: one ``[k_e, k_e]`` per expert, in the order of ``geometry.kernel_sizes``.
        gates: ``[G, E]``, 0 where the router did not select the expert; fp32 or fp64.
        scaling: ``alpha / r``.
        geometry: the layer's sizes.

    Returns:
        ``[G, folded_size]`` in the dtype of ``gates``; differentiable in ``kernels`` and ``gates``.

    Raises:
        ValueError: the number or a shape of the kernels, or the width of ``gates``, does not fit the geometry.
    """
    sizes = geometry.kernel_sizes
    kernels = tuple(kernels)  # a ParameterList looks each item up by name, every time
    found = tuple(kernel.shape[0] for kernel in kernels)
    if found != sizes:
        raise ValueError(f"kernels must have the sizes {sizes}, got {found}")
    shapes = [list(kernel.shape) for kernel in kernels]
    if shapes != [[k, k] for k in sizes]:
        raise ValueError(f"kernels must be square, one [k, k] per expert, got the shapes {shapes}")
    if gates.dim() != 2 or gates.shape[1] != geometry.num_experts:
        raise ValueError(f"gates must be [groups, {geometry.num_experts} experts], got {list(gates.shape)}")
    counts = geometry.experts_per_scale
    entries = torch.cat([kernels[expert].reshape(-1) for expert in _by_scale(geometry)]).to(gates.dtype)
    tables = entries.split([count * k * k for count, k in zip(counts, geometry.scales, strict=True)])
    blocks = []
    for gate, table, count, alp in zip(_split(gates, geometry), tables, counts, geometry.alp_factors, strict=True):
        gate, table = gate * (scaling * alp), table.view(count, -1)
        blocks.append((gate[:, :, None] * table).sum(1) if len(gate) <= MOST_TASKS else gate @ table)
    return torch.cat(blocks, dim=1)


def active_scales(gates: Tensor, geometry: PyramidGeometry) -> Tensor:
    """``[G, S]`` bool: whether a group's gates ``[G, E]`` select an expert of each of ``geometry.scales``.

    The kernel that ``fold_kernels`` makes for a scale without one is zero and gets no gradient: the ops skip it.
    """
    return torch.stack([own.any(1) for own in _split(gates != 0, geometry)], dim=1)


def mask_inactive(grad_folded: Tensor, active: Tensor, scales: Sequence[int]) -> Tensor:
    """The gradient of folded kernels ``[G, folded_size]`` with zeros for scales that are not ``active [G, S]``."""
    mask = torch.cat([active[:, s, None].expand(-1, k * k) for s, k in enumerate(scales)], dim=1)
    return grad_folded.masked_fill(~mask, 0)


# --- by a backend, in one call ----------------------------------------------------------------------------------------

#: With more tasks than this nothing is kept: the first call after a change would fold a multitude for the few it needs.
MOST_KEPT_TASKS = 256

_dtype, _device = attrgetter("dtype"), attrgetter("device")


def folder_of(routing: Routing) -> Folder | None:
    """What routes and folds these parameters in one call, or None where only tensor operations can.

    Backends take fp32 parameters that are contiguous and on one device, where nothing traces or transforms what happens
    to them.

    Raises:
        ValueError, RuntimeError: as ``backend_for``.
    """
    gate, parameters = routing.gate, routing.parameters
    if not (gate.is_cpu or gate.is_cuda) or not is_eager(*parameters):
        return None
    if not all(map(Tensor.is_contiguous, parameters)) or {*map(_dtype, parameters)} != {torch.float32}:
        return None
    if {*map(_device, parameters)} != {gate.device}:
        return None
    folder = backend_for(gate.device, torch.float32).folder
    return None if folder is None or gate.shape[0] > folder.most_experts else folder


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, folder: Folder, routing: Routing, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        fold = folder.fold(routing, save=True)
        save_routing(ctx, routing, fold)
        ctx.folder = folder
        ctx.mark_non_differentiable(fold.active)
        ctx.set_materialize_grads(False)  # zeros for ``active`` would be a launch
        return fold.folded, fold.active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched(grad)
        routing, _others, saved = saved_routing(ctx, ctx.saved_tensors)
        return None, None, *ctx.folder.fold_backward(routing, grad, saved, ctx.needs_input_grad[2:])


def save_routing(ctx: Any, routing: Routing, fold: Folded, *others: Tensor | None) -> None:
    """Save what ``fold_backward`` reads and, before it, ``others``."""
    gate, table, tasks, kernels, *plan = routing
    several = isinstance(tasks, Tensor)
    ctx.routing = (None if several else tasks, len(others), len(kernels), plan)
    ctx.save_for_backward(*others, gate, table, tasks if several else None, *kernels, *fold.saved)


def saved_routing(ctx: Any, tensors: Sequence[Any]) -> tuple[Routing, Sequence[Any], Sequence[Tensor | None]]:
    """Of ``ctx.saved_tensors``: the routing, ``others``, and what the fold saved."""
    one, start, experts, plan = ctx.routing
    (gate, table, several), end = tensors[start : start + 3], start + 3 + experts
    tasks = one if several is None else several
    return Routing(gate, table, tasks, tuple(tensors[start + 3 : end]), *plan), tensors[:start], tensors[end:]


def fold_by(folder: Folder, routing: Routing) -> tuple[Tensor, Tensor]:
    """``(folded [G, folded_size], active [G, S] bool)``, differentiable once in the parameters."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in routing.parameters):
        return apply_eagerly(_Fold, folder, routing, *routing.parameters)
    return folder.fold(routing, save=False)[:2]


class _KeptFold(NamedTuple):
    """All tasks of a layer folded, and what from; ``rows`` fills with views of single tasks, from several threads."""

    plan: tuple[int, float, PyramidGeometry]
    mark: Mark
    folded: Tensor
    active: Tensor
    rows: dict[int, tuple[Tensor, Tensor]]


def find_kept(routing: Routing, kept: Kept) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """``(folded, groups, active)`` as the ops take them, if ``kept`` still holds; see ``functional.fold_kept``."""
    known: _KeptFold | None = kept.value
    if known is None or known.plan != routing[4:] or not known.mark.holds(routing):
        return None
    tasks = routing.tasks
    if not isinstance(tasks, int):
        return known.folded, None if tasks is None else tasks.reshape(-1), known.active
    row = known.rows.get(tasks)
    if row is None:
        if not 0 <= tasks < len(known.folded):
            raise IndexError(f"task_ids holds {tasks}; allowed: 0 to {len(known.folded) - 1}")
        row = known.rows[tasks] = known.folded[tasks : tasks + 1], known.active[tasks : tasks + 1]
    return row[0], None, row[1]


def keep(routing: Routing, kept: Kept, kept_table: Kept) -> bool:
    """Fold all tasks and keep the result; False where nothing can be kept."""
    folder = None if len(routing.table) > MOST_KEPT_TASKS else folder_of(routing)
    mark = None if folder is None else folder.mark(routing, kept_table)
    if folder is None or mark is None:
        return False
    folded, active, *_ = folder.fold(routing._replace(tasks=None), save=False)
    kept.value = _KeptFold(routing[4:], mark, folded, active, {})
    return True


def find_or_keep(routing: Routing, kept: Kept, kept_table: Kept) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """What ``find_kept`` gives, after folding where nothing held; None where nothing can be kept."""
    found = find_kept(routing, kept)
    if found is None and keep(routing, kept, kept_table):
        found = find_kept(routing, kept)
    return found
