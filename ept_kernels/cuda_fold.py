"""The router and the fold by CUDA C++: from task embeddings to folded kernels in one launch, with gradients in two.

The same mathematics as ``fold_kernels`` behind a top-k softmax (spec sections 2 and 3), which takes about twenty
launches forward and twice as many backward: more than the layer around it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cuda_backend import MOST_EXPERTS as MOST_EXPERTS  # more are left to the composition
from .cuda_backend import Experts, address, launch
from .geometry import PyramidGeometry
from .tracing import refuse_batched


@lru_cache(maxsize=1024)
def _experts(geometry: PyramidGeometry, scaling: float) -> bytes:
    scale = geometry.expert_scale
    experts = Experts(
        tuple(geometry.offsets[s] for s in scale),
        geometry.kernel_sizes,
        scale,
        tuple(scaling * geometry.alp_factors[s] for s in scale),
        len(scale),
    )
    return bytes(experts)


class _Groups(NamedTuple):
    """Group g is task ``tasks[g]``, or ``first + g`` without ``tasks``."""

    tasks: Tensor | None
    first: int
    size: int


def _groups(tasks: int | Tensor | None, table: Tensor) -> _Groups:
    if isinstance(tasks, Tensor):
        tasks = tasks.reshape(-1).to(torch.int64).contiguous()
        return _Groups(tasks, 0, len(tasks))
    if tasks is None:
        return _Groups(None, 0, len(table))
    if not 0 <= tasks < len(table):
        raise IndexError(f"task_ids holds {tasks}; allowed: 0 to {len(table) - 1}")
    return _Groups(None, tasks, 1)


def _shared_arguments(
    experts: bytes, gate: Tensor, table: Tensor, groups: _Groups, kernels: Sequence[Tensor], folded_size: int
) -> tuple:
    """The fields with which both structs begin."""
    return (
        experts,
        struct.pack(f"{len(kernels)}P", *[kernel.data_ptr() for kernel in kernels]),
        gate.data_ptr(),
        table.data_ptr(),
        address(groups.tasks),
        groups.first,
        table.shape[0],
        groups.size,
        folded_size,
    )


def _fold(
    geometry: PyramidGeometry,
    scaling: float,
    top_k: int,
    groups: _Groups,
    gate: Tensor,
    table: Tensor,
    kernels: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(folded [G, F], active [G, S], gates [G, E], probability [G, E])``.

    The last two are what backward reads, None unless ``keep``; ``probability`` only where ``top_k = 1``. Gates are -1
    where an expert is not selected.
    """
    experts = gate.shape[0]
    folded = gate.new_empty(groups.size, geometry.folded_size)
    active = gate.new_empty((groups.size, len(geometry.scales)), dtype=torch.bool)
    gates = gate.new_empty(groups.size, experts) if keep else None
    probability = gate.new_empty(groups.size, experts) if keep and top_k == 1 else None
    launch(
        "ept_fold",
        gate,
        *_shared_arguments(_experts(geometry, scaling), gate, table, groups, kernels, geometry.folded_size),
        folded.data_ptr(),
        active.data_ptr(),
        address(gates),
        address(probability),
        gate.shape[1],
        len(geometry.scales),
        top_k,
    )
    return folded, active, gates, probability


class _FoldTasks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry, scaling, top_k, groups, gate, table, *kernels):
        folded, active, gates, probability = _fold(geometry, scaling, top_k, groups, gate, table, kernels, True)
        ctx.experts, ctx.first, ctx.size = _experts(geometry, scaling), groups.first, groups.size
        ctx.save_for_backward(gate, table, groups.tasks, gates, probability, *kernels)
        ctx.mark_non_differentiable(active)
        ctx.set_materialize_grads(False)  # zeros for ``active`` would be a launch
        return folded, active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched(grad)
        gate, table, tasks, gates, probability, *kernels = ctx.saved_tensors
        need_gate, need_table, *need_kernels = ctx.needs_input_grad[4:]
        grad = grad.contiguous()
        sizes = [kernel.numel() for kernel in kernels]
        logits_grad = torch.empty_like(gates) if need_gate or need_table else None
        grad_gate = torch.empty_like(gate) if need_gate else None
        grad_table = torch.empty_like(table) if need_table else None
        packed = gate.new_empty(sum(sizes)) if any(need_kernels) else None
        groups = _Groups(tasks, ctx.first, ctx.size)
        launch(
            "ept_fold_grad",
            gate,
            *_shared_arguments(ctx.experts, gate, table, groups, kernels, grad.shape[1]),
            grad.data_ptr(),
            gates.data_ptr(),
            *map(address, (probability, logits_grad, packed, grad_gate, grad_table)),
            sum(sizes),
            gate.shape[1],
        )
        grads: list[Tensor | None] = [None] * len(kernels)
        if packed is not None:
            parts = zip(packed.split(sizes), kernels, need_kernels, strict=True)
            grads = [part.view_as(kernel) if need else None for part, kernel, need in parts]
        return None, None, None, None, grad_gate, grad_table, *grads


def fold_tasks(
    gate: Tensor,
    table: Tensor,
    tasks: int | Tensor | None,
    kernels: Sequence[Tensor],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> tuple[Tensor, Tensor]:
    """Route tasks and fold the kernels of their experts (``task_folding.fold_tasks`` says for which parameters).

    Nothing waits for the device, and two runs give the same bits. The gates of a task are the softmax of its ``top_k``
    highest logits ``gate @ table[task]``, of equal ones the first; with ``top_k = 1`` the value is 1 and the gradient
    that of the softmax over all experts.

    Args:
        gate: ``[E, d]``. table: ``[T, d]``, the task embeddings.
        tasks: a row of the table; ``[G]`` integer rows on the same device; or None, all rows in order.
        kernels: one ``[k_e, k_e]`` per expert, in the order of ``geometry.kernel_sizes``.
        scaling: ``alpha / r``.

    Returns:
        ``(folded [G, folded_size], active [G, S] bool)``, as the ops take them; differentiable once in gate, table and
        kernels. NaN for a row in ``tasks`` that the table lacks: to refuse it would wait for the device.

    Raises:
        IndexError: an int that is no row of the table.
    """
    parameters = (gate, table, *kernels)
    groups = _groups(tasks, table)
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return _FoldTasks.apply(geometry, scaling, top_k, groups, *parameters)
    return _fold(geometry, scaling, top_k, groups, gate, table, kernels, keep=False)[:2]
