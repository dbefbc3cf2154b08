"""The router and the fold on a GPU: from task embeddings to folded kernels in two launches, with gradients in two.

The same mathematics as ``fold_kernels`` behind a top-k softmax (spec sections 2 and 3), which takes about twenty
launches forward and twice as many backward: more than the layer around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..geometry import PyramidGeometry
from ..tracing import apply_eagerly, refuse_batched
from .fold_backward import fold_backward
from .fold_forward import fold_forward
from .fold_layout import layout_for

#: More are left to the composition: programs compare all pairs of experts, in registers.
MOST_EXPERTS = 64


def _groups(tasks: int | Tensor | None, table: Tensor) -> tuple[Tensor | None, int, int]:
    """``(tasks [G] or None, first task, G)``."""
    if isinstance(tasks, Tensor):
        tasks = tasks.reshape(-1).to(torch.int64).contiguous()
        return tasks, 0, len(tasks)
    if tasks is None:
        return None, 0, len(table)
    if not 0 <= tasks < len(table):
        raise IndexError(f"task_ids holds {tasks}; allowed: 0 to {len(table) - 1}")
    return None, tasks, 1


class _FoldTasks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry, scaling, top_k, groups, gate, table, *kernels):
        tasks, first_task, count = groups
        layout = layout_for(geometry, scaling, gate.device)
        packed = _flatten_dense_tensors(kernels)
        folded, active, gates, probability = fold_forward(
            gate, table, tasks, first_task, count, packed, layout, len(geometry.scales), top_k, True
        )
        ctx.first_task, ctx.layout = first_task, layout
        ctx.save_for_backward(gate, table, tasks, packed, gates, probability, *kernels)
        ctx.mark_non_differentiable(active)
        ctx.set_materialize_grads(False)  # zeros for ``active`` would be a launch
        return folded, active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched(grad)
        gate, table, tasks, packed, gates, probability, *kernels = ctx.saved_tensors
        need_gate, need_table, *need_kernels = ctx.needs_input_grad[4:]
        grad_gate, grad_table, grad_packed = fold_backward(
            grad.contiguous(),
            gate,
            table,
            tasks,
            ctx.first_task,
            packed,
            gates,
            probability,
            ctx.layout,
            (need_gate, need_table, any(need_kernels)),
        )
        grads = [None] * len(kernels)
        if grad_packed is not None:
            views = _unflatten_dense_tensors(grad_packed, kernels)
            grads = [view if need else None for view, need in zip(views, need_kernels, strict=True)]
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
        return apply_eagerly(_FoldTasks, geometry, scaling, top_k, groups, *parameters)
    tasks, first_task, count = groups
    packed, layout = _flatten_dense_tensors(kernels), layout_for(geometry, scaling, gate.device)
    return fold_forward(gate, table, tasks, first_task, count, packed, layout, len(geometry.scales), top_k, keep=False)[
        :2
    ]
