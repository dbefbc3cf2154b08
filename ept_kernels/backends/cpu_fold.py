"""The router and the fold in one native call on a CPU, and what tells whether their parameters have changed.

The same mathematics as ``fold_kernels`` behind a top-k softmax, which takes about twenty tensor operations forward and
as many backward; around a small layer those would cost more than the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import PyramidGeometry
from ..problem import Folded, Kept, Routing
from .cpu_library import module

most_experts = sys.maxsize


@lru_cache(maxsize=1024)
def _experts(geometry: PyramidGeometry, scaling: float) -> Any:
    """Of each expert: its size, which scale that is, the floats before it in a folded kernel, and its factor."""
    return module().Experts(
        [
            (k, s, geometry.offsets[s], scaling * geometry.alp_factors[s])
            for k, s in zip(geometry.kernel_sizes, geometry.expert_scale, strict=True)
        ]
    )


def _native(routing: Routing) -> tuple[int, Tensor | None, Any]:
    """How many groups there are, which tasks (None: consecutive ones), and the call for C++, which holds addresses."""
    gate, table, tasks, kernels, top_k, scaling, geometry = routing
    several, first, groups = None, 0, table.shape[0]
    if isinstance(tasks, int):
        first, groups = tasks, 1
    elif tasks is not None:
        several = tasks.reshape(-1).to(table.device, torch.int64).contiguous()
        groups = several.shape[0]
    router = module().Router(
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
    return groups, several, router


def fold(routing: Routing, save: bool) -> Folded:
    """Nothing needs to be saved: the way back selects the experts anew."""
    gate, geometry = routing.gate, routing.geometry
    groups, _tasks, router = _native(routing)
    folded = gate.new_empty(groups, geometry.folded_size)
    active = gate.new_empty(groups, len(geometry.scales), dtype=torch.bool)
    router.fold(folded.data_ptr(), active.data_ptr())
    return Folded(folded, active)


def fold_backward(
    routing: Routing, grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    pairs = zip(routing.parameters, needs, strict=True)
    grads = [torch.empty_like(parameter) if need else None for parameter, need in pairs]
    grad = grad.to(torch.float32).contiguous()
    grad_gate, grad_table, *grad_kernels = (0 if g is None else g.data_ptr() for g in grads)
    _groups, _tasks, router = _native(routing)
    router.backward(grad.data_ptr(), grad_gate, grad_table, grad_kernels)
    return grads


class _Values(NamedTuple):
    """A ``problem.Mark`` by values: native copies of gate and kernels, and of the table.

    The table itself may be put together anew for each call.
    """

    parameters: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    layer: Any
    table: Any

    def holds(self, routing: Routing) -> bool:
        """Whether the parameters, which a folder could take, hold the same bits. Comparing reads what folding would.

        Raises:
            IndexError: a task that the table lacks.
        """
        gate, table, tasks, kernels, *_ = routing
        own = (gate, *kernels)  # by ``map``: a loop would take longer than the comparison
        if not gate.is_cpu or len(own) != len(self.parameters) or not all(map(is_, own, self.parameters)):
            return False  # a layer that went to a GPU has the same parameters, at addresses there
        if (table.numel(), *map(Tensor.numel, own)) != self.sizes:
            return False  # ``parameter.data`` was given another tensor
        if not self.layer.equals([*map(Tensor.data_ptr, own)]):
            return False
        count, width = table.shape
        if isinstance(tasks, int):
            return self.table.rows_equal(table.data_ptr(), width * 4, 0, 0, tasks)
        if tasks is not None and tasks.numel() < count:
            rows = tasks.reshape(-1).to(torch.int64).contiguous()
            return self.table.rows_equal(table.data_ptr(), width * 4, rows.data_ptr(), len(rows), 0)
        return self.table.equals([table.data_ptr()])


def _snapshot(*arrays: Tensor) -> Any:
    return module().Snapshot([(array.data_ptr(), array.numel() * array.element_size()) for array in arrays])


def mark(routing: Routing, kept_table: Kept) -> _Values:
    """A new copy of the table only where it has changed: the layers of a model share it."""
    gate, table, _, kernels, *_ = routing
    known = kept_table.value
    if known is None or known[0] != table.numel() or not known[1].equals([table.data_ptr()]):
        known = kept_table.value = table.numel(), _snapshot(table)
    own = (gate, *kernels)
    return _Values(own, tuple(map(Tensor.numel, (table, *own))), _snapshot(*own), known[1])
