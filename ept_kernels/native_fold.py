"""The router and the fold in one native call: from task embeddings to folded kernels on a CPU, with gradients.

The same mathematics as ``fold_kernels`` behind a top-k softmax (spec sections 2 and 3), which takes about twenty tensor
operations forward and as many backward; around a small layer those would cost more than the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import native
from .geometry import PyramidGeometry
from .tracing import refuse_batched


@lru_cache(maxsize=1024)
def _experts(geometry: PyramidGeometry, scaling: float) -> tuple[tuple[int, int, int, float], ...]:
    """Of each expert: its size, which scale that is, the floats before it in a folded kernel, and its factor."""
    return tuple(
        (k, s, geometry.offsets[s], scaling * geometry.alp_factors[s])
        for k, s in zip(geometry.kernel_sizes, geometry.expert_scale, strict=True)
    )


class _Call:
    """The arguments that forward and backward share, in the order of the C++ functions, kept alive while they run."""

    def __init__(
        self,
        geometry: PyramidGeometry,
        scaling: float,
        top_k: int,
        tasks: int | Tensor | None,
        gate: Tensor,
        table: Tensor,
        kernels: Sequence[Tensor],
    ) -> None:
        several, first = None, 0
        if isinstance(tasks, Tensor):
            several = tasks.reshape(-1).to(gate.device, torch.int64).contiguous()
            self.groups = len(several)
        elif tasks is None:
            self.groups = table.shape[0]
        else:
            self.groups, first = 1, tasks
        self.tensors = (gate, table, several, *kernels)
        self.arguments = (
            _experts(geometry, scaling),
            top_k,
            gate.shape[1],
            gate.data_ptr(),
            table.data_ptr(),
            table.shape[0],
            self.groups,
            0 if several is None else several.data_ptr(),
            first,
            [kernel.data_ptr() for kernel in kernels],
        )


def _fold(
    geometry: PyramidGeometry,
    scaling: float,
    top_k: int,
    tasks: int | Tensor | None,
    gate: Tensor,
    table: Tensor,
    kernels: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(folded, active, expert index [G, top_k], gates [G, top_k])``."""
    call = _Call(geometry, scaling, top_k, tasks, gate, table, kernels)
    folded = gate.new_empty(call.groups, geometry.folded_size)
    active = gate.new_empty(call.groups, len(geometry.scales), dtype=torch.bool)
    index = gate.new_empty(call.groups, top_k, dtype=torch.int64)
    gates = gate.new_empty(call.groups, top_k)
    native.module().fold_tasks(
        *call.arguments, index.data_ptr(), gates.data_ptr(), folded.data_ptr(), active.data_ptr()
    )
    return folded, active, index, gates


class _FoldTasks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry, scaling, top_k, tasks, gate, table, *kernels):
        folded, active, index, gates = _fold(geometry, scaling, top_k, tasks, gate, table, kernels)
        ctx.plan = (geometry, scaling, top_k)
        ctx.task = tasks if isinstance(tasks, int) else None
        ctx.save_for_backward(tasks if isinstance(tasks, Tensor) else None, index, gates, gate, table, *kernels)
        ctx.mark_non_differentiable(active)
        return folded, active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(grad)
        tasks, index, gates, *parameters = ctx.saved_tensors
        gate, table, *kernels = parameters
        needs = ctx.needs_input_grad[4:]
        grads = [torch.empty_like(p) if need else None for p, need in zip(parameters, needs, strict=True)]
        grad = grad.to(torch.float32).contiguous()
        geometry, scaling, top_k = ctx.plan
        call = _Call(geometry, scaling, top_k, tasks if ctx.task is None else ctx.task, gate, table, kernels)
        grad_gate, grad_table, *grad_kernels = (0 if g is None else g.data_ptr() for g in grads)
        native.module().fold_tasks_backward(
            *call.arguments,
            index.data_ptr(),
            gates.data_ptr(),
            grad.data_ptr(),
            grad_gate,
            grad_table,
            grad_kernels,
        )
        return None, None, None, None, *grads


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

    The gates of a task are the softmax of its ``top_k`` highest logits ``gate @ table[task]``; with ``top_k = 1`` the
    value is 1 and the gradient that of the softmax over all experts.

    Args:
        gate: ``[E, d]``. table: ``[T, d]``, the task embeddings.
        tasks: a row of the table; ``[G]`` int64 rows; or None, all rows in order.
        kernels: one ``[k_e, k_e]`` per expert, in the order of ``geometry.kernel_sizes``.
        scaling: ``alpha / r``.

    Returns:
        ``(folded [G, folded_size], active [G, S] bool)``, as the ops take them; differentiable once in gate, table and
        kernels.

    Raises:
        IndexError: a task that the table lacks.
    """
    parameters = (gate, table, *kernels)
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return _FoldTasks.apply(geometry, scaling, top_k, tasks, *parameters)
    folded, active, _, _ = _fold(geometry, scaling, top_k, tasks, gate, table, kernels)
    return folded, active
