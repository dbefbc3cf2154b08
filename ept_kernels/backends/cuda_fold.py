"""The router and the fold by CUDA C++: from task embeddings to folded kernels in one launch, with gradients in two.

The same mathematics as ``fold_kernels`` behind a top-k softmax, which takes about twenty launches forward and twice as
many backward: more than the layer around it. Nothing waits for the device, and results are bit-identical in every run.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..geometry import PyramidGeometry
from ..problem import Folded, Groups, Routing, RoutingStamp
from .cuda_library import MOST_EXPERTS, Experts, address, launch

most_experts = MOST_EXPERTS  # more are left to the composition
mark = RoutingStamp.of


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


def _shared_fields(routing: Routing, groups: Groups) -> tuple[object, ...]:
    """The fields with which both structs begin."""
    gate, table, _, kernels, _, scaling, geometry = routing
    return (
        _experts(geometry, scaling),
        struct.pack(f"{len(kernels)}P", *[kernel.data_ptr() for kernel in kernels]),
        gate.data_ptr(),
        table.data_ptr(),
        address(groups.tasks),
        groups.first,
        table.shape[0],
        groups.size,
        geometry.folded_size,
    )


def fold(routing: Routing, save: bool) -> Folded:
    """Gates are -1 where an expert is not selected; ``probability`` only where ``top_k = 1``."""
    groups, gate, geometry = Groups.of(routing), routing.gate, routing.geometry
    folded = gate.new_empty(groups.size, geometry.folded_size)
    active = gate.new_empty((groups.size, len(geometry.scales)), dtype=torch.bool)
    gates = gate.new_empty(groups.size, gate.shape[0]) if save else None
    probability = gate.new_empty(groups.size, gate.shape[0]) if save and routing.top_k == 1 else None
    launch(
        "ept_fold",
        gate,
        *_shared_fields(routing, groups),
        folded.data_ptr(),
        active.data_ptr(),
        address(gates),
        address(probability),
        gate.shape[1],
        len(geometry.scales),
        routing.top_k,
    )
    return Folded(folded, active, (gates, probability))


def fold_backward(
    routing: Routing, grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    gate, table, _, kernels, *_ = routing
    gates, probability = saved
    need_gate, need_table, *need_kernels = needs
    grad = grad.contiguous()
    sizes = [kernel.numel() for kernel in kernels]
    logits_grad = None if gates is None or not (need_gate or need_table) else torch.empty_like(gates)
    grad_gate = torch.empty_like(gate) if need_gate else None
    grad_table = torch.empty_like(table) if need_table else None
    packed = gate.new_empty(sum(sizes)) if any(need_kernels) else None
    launch(
        "ept_fold_grad",
        gate,
        *_shared_fields(routing, Groups.of(routing)),
        grad.data_ptr(),
        *map(address, (gates, probability, logits_grad, packed, grad_gate, grad_table)),
        sum(sizes),
        gate.shape[1],
    )
    grads: list[Tensor | None] = [None] * len(kernels)
    if packed is not None:
        parts = zip(packed.split(sizes), kernels, need_kernels, strict=True)
        grads = [part.view_as(kernel) if need else None for part, kernel, need in parts]
    return [grad_gate, grad_table, *grads]
