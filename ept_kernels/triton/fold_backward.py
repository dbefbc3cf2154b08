"""Gradients of the router and the kernels of all experts, in two launches; sums in a fixed order.

slope[g, e] = factor[e] sum_f dKbar[g, f] K_e[f]        dlogits[g] = the softmax's gradient of slope[g]
dK_e = factor[e] sum_g gates[g, e] dKbar[g]             dgate = dlogits^T table[tasks]
dtable[t] = sum_{g: task_g = t} dlogits[g] gate
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from ..problem import Groups, Routing
from .fold_layout import fold_blocks, layout_for, task_of
from .launch import FROM_BATCH, Config, launch


@triton.jit(do_not_specialize=FROM_BATCH)
def logits_grad_kernel(
    grad_ptr,  # [G, entries], dKbar
    packed_ptr,  # [P]
    source_ptr,  # [E, entries]
    factor_ptr,  # [E]
    gates_ptr,  # [G, E], -1 where not selected
    probability_ptr,  # [G, E] where one expert is selected, else None
    out_ptr,  # [G, E], dlogits
    experts: tl.constexpr,
    entries: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    group = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    exists = e < experts
    place = group.to(tl.int64) * experts + e
    gates = tl.load(gates_ptr + place, mask=exists, other=-1.0)
    selected = (gates < 0) == 0  # NaN is
    gates = tl.where(selected, gates, 0.0)

    products = tl.zeros((BLOCK_E, BLOCK_F), tl.float32)
    for start in range(0, entries, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        grad = tl.load(grad_ptr + group.to(tl.int64) * entries + f, mask=f < entries, other=0.0)
        wanted = selected[:, None] & (f < entries)[None, :]
        source = tl.load(source_ptr + e[:, None] * entries + f[None, :], mask=wanted, other=-1)
        kernels = tl.load(packed_ptr + source, mask=source >= 0, other=0.0)
        products += tl.where(source >= 0, grad[None, :] * kernels, 0.0)
    slope = tl.sum(products, 1) * tl.load(factor_ptr + e, mask=exists, other=0.0)

    if probability_ptr is None:
        # Sums of differences: a slope minus the mean of slopes would round to 0 where one gate is nearly 1.
        difference = slope[:, None] - slope[None, :]
        result = gates * tl.sum(gates[None, :] * difference, 1)
    else:
        # The value of the one gate is 1, its gradient that of the softmax over all experts.
        probability = tl.load(probability_ptr + place, mask=exists, other=0.0)
        share = tl.sum(tl.where(selected, probability, 0.0), 0)
        others = tl.sum(tl.where(selected, 0.0, probability), 0)  # not 1 - share, for the same reason
        pull = tl.sum(tl.where(selected, slope, 0.0), 0) * share
        result = tl.where(selected, pull * others, -pull * probability)
    tl.store(out_ptr + place, result, mask=exists)


@triton.jit
def sum_kernels(
    grad_ptr,
    gates_ptr,
    factor_ptr,
    expert_ptr,
    entry_ptr,
    out_ptr,
    num_groups,
    experts,
    entries,
    numbers,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``dK`` of a block of packed numbers: over the groups that selected their experts."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = p < numbers
    expert = tl.load(expert_ptr + p, mask=exists, other=0)
    entry = tl.load(entry_ptr + p, mask=exists, other=0)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, num_groups, BLOCK_G):
        g = (start + tl.arange(0, BLOCK_G)).to(tl.int64)
        inside = (g < num_groups)[:, None] & exists[None, :]
        gates = tl.load(gates_ptr + g[:, None] * experts + expert[None, :], mask=inside, other=-1.0)
        selected = (gates < 0) == 0
        grad = tl.load(grad_ptr + g[:, None] * entries + entry[None, :], mask=selected, other=0.0)
        total += tl.sum(tl.where(selected, gates * grad, 0.0), 0)
    tl.store(out_ptr + p, total * tl.load(factor_ptr + expert, mask=exists, other=0.0), mask=exists)


@triton.jit
def sum_gate(
    slope_ptr,
    table_ptr,
    tasks_ptr,
    out_ptr,
    first_task,
    num_tasks,
    num_groups,
    experts,
    width,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``dgate`` of one expert and a block of its channels: over the groups."""
    blocks = tl.cdiv(width, BLOCK_W)
    e = tl.program_id(0) // blocks
    if e < experts:
        d = (tl.program_id(0) % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
        total = tl.zeros((BLOCK_W,), tl.float32)
        for start in range(0, num_groups, BLOCK_G):
            g = start + tl.arange(0, BLOCK_G)
            slope = tl.load(slope_ptr + g.to(tl.int64) * experts + e, mask=g < num_groups, other=0.0)
            task = task_of(tasks_ptr, first_task, g, g < num_groups)
            known = (task >= 0) & (task < num_tasks)
            lines = table_ptr + task[:, None] * width
            rows = tl.load(lines + d[None, :], mask=known[:, None] & (d < width)[None, :], other=0.0)
            total += tl.sum(slope[:, None] * rows, 0)
        tl.store(out_ptr + e * width + d, total, mask=d < width)


@triton.jit
def sum_table(
    slope_ptr,
    gate_ptr,
    tasks_ptr,
    out_ptr,
    first_task,
    num_tasks,
    num_groups,
    experts,
    width,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``dtable`` of one task and a block of its channels: over the groups of the task, then over the experts."""
    blocks = tl.cdiv(width, BLOCK_W)
    task = tl.program_id(0) // blocks
    if task < num_tasks:
        d = (tl.program_id(0) % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
        e = tl.arange(0, BLOCK_E)
        exists = e < experts
        total = tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, num_groups, BLOCK_G):
            g = start + tl.arange(0, BLOCK_G)
            own = (g < num_groups) & (task_of(tasks_ptr, first_task, g, g < num_groups) == task)
            inside = own[:, None] & exists[None, :]
            total += tl.sum(tl.load(slope_ptr + g[:, None].to(tl.int64) * experts + e[None, :], inside, 0.0), 0)
        gate = tl.load(
            gate_ptr + e[:, None] * width + d[None, :], mask=exists[:, None] & (d < width)[None, :], other=0.0
        )
        tl.store(out_ptr + task.to(tl.int64) * width + d, tl.sum(total[:, None] * gate, 0), mask=d < width)


@triton.jit(do_not_specialize=FROM_BATCH)
def fold_grad_kernel(
    grad_ptr,  # [G, entries], dKbar
    slope_ptr,  # [G, E], dlogits
    gate_ptr,  # [E, width]
    table_ptr,  # [T, width]
    tasks_ptr,  # [G] int64, or None
    gates_ptr,  # [G, E], -1 where not selected
    factor_ptr,  # [E]
    expert_ptr,  # [P]
    entry_ptr,  # [P]
    grad_kernels_ptr,  # [P], or None: not wanted; so the other two
    grad_gate_ptr,  # [E, width]
    grad_table_ptr,  # [T, width]
    first_task,
    num_groups,
    SIZES: tl.constexpr,  # tasks, experts, width, entries, packed numbers
    BLOCKS: tl.constexpr,  # of experts, groups, packed numbers, channels
):
    num_tasks: tl.constexpr = SIZES[0]
    experts: tl.constexpr = SIZES[1]
    width: tl.constexpr = SIZES[2]
    entries: tl.constexpr = SIZES[3]
    numbers: tl.constexpr = SIZES[4]
    BLOCK_E: tl.constexpr = BLOCKS[0]
    BLOCK_G: tl.constexpr = BLOCKS[1]
    BLOCK_P: tl.constexpr = BLOCKS[2]
    BLOCK_W: tl.constexpr = BLOCKS[3]
    section = tl.program_id(1)
    if grad_kernels_ptr is not None:
        if section == 0:
            sum_kernels(
                grad_ptr,
                gates_ptr,
                factor_ptr,
                expert_ptr,
                entry_ptr,
                grad_kernels_ptr,
                num_groups,
                experts,
                entries,
                numbers,
                BLOCK_G,
                BLOCK_P,
            )
    if grad_gate_ptr is not None:
        if section == 1:
            sum_gate(
                slope_ptr,
                table_ptr,
                tasks_ptr,
                grad_gate_ptr,
                first_task,
                num_tasks,
                num_groups,
                experts,
                width,
                BLOCK_G,
                BLOCK_W,
            )
    if grad_table_ptr is not None:
        if section == 2:
            sum_table(
                slope_ptr,
                gate_ptr,
                tasks_ptr,
                grad_table_ptr,
                first_task,
                num_tasks,
                num_groups,
                experts,
                width,
                BLOCK_E,
                BLOCK_G,
                BLOCK_W,
            )


@lru_cache
def _logits_config(experts: int, entries: int) -> Config:
    """A program a group."""
    block, block_entries = fold_blocks(experts, entries)
    return Config.of(BLOCK_E=block, BLOCK_F=block_entries, num_warps=4, num_stages=1)


@lru_cache
def _sums_config(experts: int) -> Config:
    return Config.of(BLOCKS=(triton.next_power_of_2(experts), 16, 64, 128), num_warps=4, num_stages=1)


def fold_backward(
    routing: Routing, grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    gate, table, _, kernels, _, scaling, geometry = routing
    packed, gates, probability = saved
    need_gate, need_table, *need_kernels = needs
    grad, groups, layout = grad.contiguous(), Groups.of(routing), layout_for(geometry, scaling, gate.device)
    (experts, width), entries, numbers = gate.shape, geometry.folded_size, len(layout.expert)
    slope = None
    if (need_gate or need_table) and gates is not None:
        slope = torch.empty_like(gates)
        launch(
            logits_grad_kernel,
            (groups.size,),
            grad,
            packed,
            layout.source,
            layout.factor,
            gates,
            probability,
            slope,
            config=_logits_config(experts, entries),
            experts=experts,
            entries=entries,
        )
    grad_gate = torch.empty_like(gate) if need_gate else None
    grad_table = torch.empty_like(table) if need_table else None
    grad_packed = gate.new_empty(numbers) if any(need_kernels) else None
    config = _sums_config(experts)
    _, _, block_p, block_w = config["BLOCKS"]
    blocks = -(-width // block_w)
    programs = (
        -(-numbers // block_p) * (grad_packed is not None),
        experts * blocks * need_gate,
        len(table) * blocks * need_table,
    )
    launch(
        fold_grad_kernel,
        (max(programs), 3),
        grad,
        slope,
        gate,
        table,
        groups.tasks,
        gates,
        layout.factor,
        layout.expert,
        layout.entry,
        grad_packed,
        grad_gate,
        grad_table,
        groups.first,
        groups.size,
        config=config,
        SIZES=(len(table), experts, width, entries, numbers),
    )
    grads: list[Tensor | None] = [None] * len(kernels)
    if grad_packed is not None:
        views = _unflatten_dense_tensors(grad_packed, kernels)
        grads = [view if need else None for view, need in zip(views, need_kernels, strict=True)]
    return [grad_gate, grad_table, *grads]
