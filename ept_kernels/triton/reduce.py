"""Second stage of the parameter gradients: partial sums of dA, dB and dKbar, all in one launch, in a fixed order.

Where every row is a unit of dKbar, spans of them are summed before (``factor_grad.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import reduce_config
from .launch import FROM_BATCH, launch
from .plan import Plan


@triton.jit
def sum_factor(
    partial_ptr,  # [spans, S, rank, features]
    out_ptr,  # [rank, slots] by strides
    spans,
    features,
    rank,
    slots,
    stride_p,
    stride_j,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """``dF[p, j]`` of one rank and a block of j: over spans, scales and slots."""
    blocks = tl.cdiv(slots, BLOCK_J)
    index = tl.program_id(0)
    p = index // blocks
    if p < rank:
        j = (index % blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
        total = tl.zeros((BLOCK_J,), tl.float32)
        for s in tl.static_range(len(SCALES)):
            q = tl.arange(0, SLOTS[s])
            c = j[:, None] * SCALES[s] + q[None, :]
            inside = (q < SCALES[s])[None, :] & (c < features)
            for part in range(spans):
                line = tl.cast((part * len(SCALES) + s) * rank + p, tl.int64) * features
                total += tl.sum(tl.load(partial_ptr + line + c, mask=inside, other=0.0), 1)
        tl.store(out_ptr + p * stride_p + j * stride_j, total, mask=j < slots)


@triton.jit
def used_entries(uses_ptr, group, entry, SCALES: tl.constexpr, OFFSETS: tl.constexpr):
    """Which entries of a group's folded kernel belong to a scale that it uses; the others have no partial sums."""
    used = entry < 0
    for s in tl.static_range(len(SCALES)):
        own = (entry >= OFFSETS[s]) & (entry < OFFSETS[s] + SCALES[s] * SCALES[s])
        used = used | (own & (tl.load(uses_ptr + group.to(tl.int64) * len(SCALES) + s).to(tl.int32) != 0))
    return used


@triton.jit
def sum_units(
    partial_ptr,  # [rank blocks, units, FOLDED]
    groups_ptr,  # [segments], or None: all units from ``first`` to ``last`` are the group's
    uses_ptr,  # [G, S] bool, or None: every scale has partial sums
    group,
    entry,  # [BLOCK_F]
    first,
    last,
    units,
    units_per_segment,
    rank_blocks,
    SCALES: tl.constexpr,
    OFFSETS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Entries of a group's kernel, summed over those of the units that are its own, and over the rank blocks."""
    total = tl.zeros((BLOCK_F,), tl.float32)
    exists = entry < FOLDED
    if uses_ptr is not None:
        exists = exists & used_entries(uses_ptr, group, entry, SCALES, OFFSETS)
    for u0 in range(first, last, BLOCK_U):
        unit = u0 + tl.arange(0, BLOCK_U)
        own = unit < last
        if groups_ptr is not None:
            own = own & (tl.load(groups_ptr + unit // units_per_segment, mask=own, other=-1) == group)
        for block in range(rank_blocks):
            line = tl.cast(block * units + unit, tl.int64) * FOLDED
            inside = own[:, None] & exists[None, :]
            total += tl.sum(tl.load(partial_ptr + line[:, None] + entry[None, :], mask=inside, other=0.0), 0)
    return total


@triton.jit
def sum_folded(
    partial_ptr,
    groups_ptr,
    uses_ptr,
    out_ptr,  # [G, FOLDED]
    num_groups,
    units,
    units_per_segment,
    rank_blocks,
    SCALES: tl.constexpr,
    OFFSETS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``dKbar`` of one group and a block of its entries: over the units of the group and the rank blocks."""
    blocks = tl.cdiv(FOLDED, BLOCK_F)
    index = tl.program_id(0)
    group = index // blocks
    if group < num_groups:
        entry = (index % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
        if groups_ptr is None:  # segment g is group g
            first = group * units_per_segment
            last = tl.minimum(first + units_per_segment, units)
        else:
            first = 0
            last = units
        total = sum_units(
            partial_ptr,
            groups_ptr,
            uses_ptr,
            group,
            entry,
            first,
            last,
            units,
            units_per_segment,
            rank_blocks,
            SCALES,
            OFFSETS,
            FOLDED,
            BLOCK_U,
            BLOCK_F,
        )
        tl.store(out_ptr + group.to(tl.int64) * FOLDED + entry, total, mask=entry < FOLDED)


@triton.jit(do_not_specialize=FROM_BATCH)
def reduce_kernel(
    partial_a_ptr,
    grad_a_ptr,
    partial_b_ptr,
    grad_b_ptr,
    partial_folded_ptr,
    grad_folded_ptr,
    groups_ptr,
    uses_ptr,
    a_spans,
    b_spans,
    in_features,
    out_features,
    rank,
    width,
    height,
    a_stride_p,
    a_stride_j,
    b_stride_p,
    b_stride_j,
    num_groups,
    units,
    units_per_segment,
    rank_blocks,
    SCALES: tl.constexpr,
    SLOTS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    section = tl.program_id(1)
    if partial_a_ptr is not None:
        if section == 0:
            sum_factor(
                partial_a_ptr,
                grad_a_ptr,
                a_spans,
                in_features,
                rank,
                width,
                a_stride_p,
                a_stride_j,
                SCALES,
                SLOTS,
                BLOCK_J,
            )
    if partial_b_ptr is not None:
        if section == 1:
            sum_factor(
                partial_b_ptr,
                grad_b_ptr,
                b_spans,
                out_features,
                rank,
                height,
                b_stride_p,
                b_stride_j,
                SCALES,
                SLOTS,
                BLOCK_J,
            )
    if partial_folded_ptr is not None:
        if section == 2:
            sum_folded(
                partial_folded_ptr,
                groups_ptr,
                uses_ptr,
                grad_folded_ptr,
                num_groups,
                units,
                units_per_segment,
                rank_blocks,
                SCALES,
                OFFSETS,
                FOLDED,
                BLOCK_U,
                BLOCK_F,
            )


def reduce_gradients(
    plan: Plan,
    *,
    partial_a: Tensor | None = None,
    grad_a: Tensor | None = None,
    partial_b: Tensor | None = None,
    grad_b: Tensor | None = None,
    partial_folded: Tensor | None = None,
    grad_folded: Tensor | None = None,
    groups: Tensor | None = None,
    uses: Tensor | None = None,
    units_per_segment: int = 1,
) -> None:
    """Write ``grad_a [r, w]``, ``grad_b [r, h]`` (a transposed view of dB) and ``grad_folded [G, folded_size]``.

    Args:
        partial_a, partial_b: ``[spans, S, r, features]`` fp32. partial_folded: ``[rank blocks, units, folded_size]``
            fp32; or ``[spans, G, folded_size]`` from the first stage, a unit a group.
        groups: ``[N]``; unit u belongs to ``groups[u // units_per_segment]``. None: ``u // units_per_segment`` itself.
        uses: ``[G, S]`` bool, contiguous: what a group does not use has no partial sums, and the gradient zero.
    """
    config = reduce_config()

    def programs(grad: Tensor | None) -> int:
        return 0 if grad is None else plan.rank * triton.cdiv(grad.shape[1], config["BLOCK_J"])

    folded_programs = 0
    if grad_folded is not None:
        folded_programs = grad_folded.shape[0] * triton.cdiv(plan.folded_size, config["BLOCK_F"])
    launch(
        reduce_kernel,
        (max(programs(grad_a), programs(grad_b), folded_programs), 3),
        partial_a,
        grad_a,
        partial_b,
        grad_b,
        partial_folded,
        grad_folded,
        groups,
        uses,
        0 if partial_a is None else partial_a.shape[0],
        0 if partial_b is None else partial_b.shape[0],
        0 if partial_a is None else partial_a.shape[3],
        0 if partial_b is None else partial_b.shape[3],
        plan.rank,
        0 if grad_a is None else grad_a.shape[1],
        0 if grad_b is None else grad_b.shape[1],
        *((0, 0) if grad_a is None else grad_a.stride()),
        *((0, 0) if grad_b is None else grad_b.stride()),
        0 if grad_folded is None else grad_folded.shape[0],
        0 if partial_folded is None else partial_folded.shape[1],
        units_per_segment,
        0 if partial_folded is None else partial_folded.shape[0],
        config=config,
        SCALES=plan.scales,
        SLOTS=plan.slots,
        OFFSETS=plan.offsets,
        FOLDED=plan.folded_size,
    )
