"""From task embeddings to folded kernels in one launch, a program a group.

logits[g, e] = sum_d gate[e, d] table[task_g, d]        gates[g] = softmax of the top_k logits, 0 for the other experts
Kbar[g, f] = sum_e gates[g, e] factor[e] K_e[f]         A group whose task does not exist gets NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch._utils import _flatten_dense_tensors

from ..problem import Folded, Groups, Routing
from .fold_layout import fold_blocks, layout_for, task_of
from .launch import FROM_BATCH, Config, launch


@triton.jit(do_not_specialize=FROM_BATCH)
def fold_kernel(
    gate_ptr,  # [E, width]
    table_ptr,  # [T, width]
    tasks_ptr,  # [G] int64, or None: first_task and those after it
    packed_ptr,  # [P]
    source_ptr,  # [E, entries]
    scale_ptr,  # [E]
    factor_ptr,  # [E]
    folded_ptr,  # [G, entries]
    active_ptr,  # [G, scales] bool
    gates_ptr,  # [G, E], -1 where not selected; or None
    probability_ptr,  # [G, E], the softmax over all experts; or None
    first_task,
    SIZES: tl.constexpr,  # tasks, experts, width, entries, scales, top_k
    BLOCKS: tl.constexpr,  # of experts, channels, entries, scales
):
    num_tasks: tl.constexpr = SIZES[0]
    experts: tl.constexpr = SIZES[1]
    width: tl.constexpr = SIZES[2]
    entries: tl.constexpr = SIZES[3]
    scales: tl.constexpr = SIZES[4]
    top_k: tl.constexpr = SIZES[5]
    BLOCK_E: tl.constexpr = BLOCKS[0]
    BLOCK_D: tl.constexpr = BLOCKS[1]
    BLOCK_F: tl.constexpr = BLOCKS[2]
    BLOCK_S: tl.constexpr = BLOCKS[3]
    group = tl.program_id(0)
    task = task_of(tasks_ptr, first_task, group, True)
    known = (task >= 0) & (task < num_tasks)
    line = table_ptr + tl.where(known, task, 0) * width
    e = tl.arange(0, BLOCK_E)
    exists = e < experts

    products = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        gate = tl.load(
            gate_ptr + e[:, None] * width + d[None, :], mask=exists[:, None] & (d < width)[None, :], other=0.0
        )
        products += gate * tl.load(line + d, mask=d < width, other=0.0)[None, :]
    logits = tl.where(known, tl.sum(products, 1), float("nan"))

    # How many experts come before: NaN ranks above every number, so that it shows; ties go to the first expert.
    key = tl.where(logits != logits, float("inf"), logits)
    key = tl.where(exists, key, float("-inf"))
    before = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (e[None, :] < e[:, None]))
    selected = exists & (tl.sum(before.to(tl.int32), 1) < top_k)

    highest = tl.max(tl.where(exists, logits, float("-inf")), 0)
    powers = tl.where(exists, tl.exp(logits - highest), 0.0)
    chosen = tl.where(selected, powers, 0.0)
    gates = chosen / tl.sum(chosen, 0)
    place = group.to(tl.int64) * experts + e
    if gates_ptr is not None:
        tl.store(gates_ptr + place, tl.where(selected, gates, -1.0), mask=exists)
    if probability_ptr is not None:
        tl.store(probability_ptr + place, powers / tl.sum(powers, 0), mask=exists)

    s = tl.arange(0, BLOCK_S)
    scale = tl.load(scale_ptr + e, mask=exists, other=-1)
    uses = (scale[:, None] == s[None, :]) & selected[:, None]
    tl.store(active_ptr + group.to(tl.int64) * scales + s, tl.max(uses.to(tl.int32), 0) != 0, mask=s < scales)

    weight = gates * tl.load(factor_ptr + e, mask=exists, other=0.0)
    for start in range(0, entries, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        wanted = selected[:, None] & (f < entries)[None, :]
        source = tl.load(source_ptr + e[:, None] * entries + f[None, :], mask=wanted, other=-1)
        kernels = tl.load(packed_ptr + source, mask=source >= 0, other=0.0)
        total = tl.sum(tl.where(source >= 0, weight[:, None] * kernels, 0.0), 0)
        tl.store(folded_ptr + group.to(tl.int64) * entries + f, total, mask=f < entries)


@lru_cache  # Triton's own rounding would be noticed beside a kernel of microseconds
def _config(experts: int, width: int, entries: int, scales: int) -> Config:
    """Few programs run, each alone: what counts is loads in flight."""
    block, block_entries = fold_blocks(experts, entries)
    block_width, block_scales = min(8192 // block, triton.next_power_of_2(width)), triton.next_power_of_2(scales)
    return Config.of(BLOCKS=(block, block_width, block_entries, block_scales), num_warps=8, num_stages=1)


def fold(routing: Routing, save: bool) -> Folded:
    """Gates are -1 where an expert is not selected; ``probability`` only where ``top_k = 1``."""
    gate, table, _, kernels, top_k, scaling, geometry = routing
    groups, layout = Groups.of(routing), layout_for(geometry, scaling, gate.device)
    (experts, width), entries, scales = gate.shape, geometry.folded_size, len(geometry.scales)
    folded = gate.new_empty(groups.size, entries)
    active = gate.new_empty((groups.size, scales), dtype=torch.bool)
    gates = gate.new_empty(groups.size, experts) if save else None
    probability = gate.new_empty(groups.size, experts) if save and top_k == 1 else None
    packed = _flatten_dense_tensors(kernels)
    launch(
        fold_kernel,
        (groups.size,),
        gate,
        table,
        groups.tasks,
        packed,
        layout.source,
        layout.scale,
        layout.factor,
        folded,
        active,
        gates,
        probability,
        groups.first,
        config=_config(experts, width, entries, scales),
        SIZES=(len(table), experts, width, entries, scales, top_k),
    )
    return Folded(folded, active, (packed, gates, probability))
