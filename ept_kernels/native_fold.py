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
from .tracing import apply_eagerly, refuse_batched


@lru_cache(maxsize=1024)
def _experts(geometry: PyramidGeometry, scaling: float) -> Any:
    """Of each expert: its size, which scale that is, the floats before it in a folded kernel, and its factor."""
    return native.module().Experts(
        [
            (k, s, geometry.offsets[s], scaling * geometry.alp_factors[s])
            for k, s in zip(geometry.kernel_sizes, geometry.expert_scale, strict=True)
        ]
    )


def _rows(tasks: int | Tensor | None, table: Tensor) -> tuple[int, Tensor | None, int]:
    """How many rows of the table, which (None: consecutive ones), and the first of these."""
    if isinstance(tasks, int):
        return 1, None, tasks
    if tasks is None:
        return table.shape[0], None, 0
    several = tasks.reshape(-1).to(table.device, torch.int64).contiguous()
    return several.shape[0], several, 0


def _router(
    geometry: PyramidGeometry,
    scaling: float,
    top_k: int,
    rows: tuple[int, Tensor | None, int],
    gate: Tensor,
    table: Tensor,
    kernels: Sequence[Tensor],
) -> Any:
    """What forward and backward share, for C++. It holds addresses: the tensors must outlive it."""
    groups, several, first = rows
    return native.module().Router(
        _experts(geometry, scaling),
        top_k,
        gate.shape[1],
        gate.data_ptr(),
        table.data_ptr(),
        table.shape[0],
        groups,
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
) -> tuple[Tensor, Tensor]:
    rows = _rows(tasks, table)
    folded = gate.new_empty(rows[0], geometry.folded_size)
    active = gate.new_empty(rows[0], len(geometry.scales), dtype=torch.bool)
    _router(geometry, scaling, top_k, rows, gate, table, kernels).fold(folded.data_ptr(), active.data_ptr())
    return folded, active


class _FoldTasks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry, scaling, top_k, tasks, gate, table, *kernels):
        folded, active = _fold(geometry, scaling, top_k, tasks, gate, table, kernels)
        ctx.plan = (geometry, scaling, top_k)
        ctx.task = tasks if isinstance(tasks, int) else None
        ctx.save_for_backward(tasks if isinstance(tasks, Tensor) else None, gate, table, *kernels)
        ctx.mark_non_differentiable(active)
        return folded, active

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(grad)
        tasks, *parameters = ctx.saved_tensors
        gate, table, *kernels = parameters
        needs = ctx.needs_input_grad[4:]
        grads = [torch.empty_like(p) if need else None for p, need in zip(parameters, needs, strict=True)]
        grad = grad.to(torch.float32).contiguous()
        grad_gate, grad_table, *grad_kernels = (0 if g is None else g.data_ptr() for g in grads)
        geometry, scaling, top_k = ctx.plan
        rows = _rows(tasks if ctx.task is None else ctx.task, table)
        router = _router(geometry, scaling, top_k, rows, gate, table, kernels)
        router.backward(grad.data_ptr(), grad_gate, grad_table, grad_kernels)
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
    if torch.is_grad_enabled():
        return apply_eagerly(_FoldTasks, geometry, scaling, top_k, tasks, gate, table, *kernels)
    return _fold(geometry, scaling, top_k, tasks, gate, table, kernels)
