"""The core of every row: its group's kernel of each scale, applied to each rank; with its gradients.

V[t, (k, p, a)]  = sum_q Kbar_k[g(t)][a, q] U[t, (k, p, q)]
dU[t, (k, p, q)] = sum_a Kbar_k[g(t)][a, q] dV[t, (k, p, a)]
dKbar_k[g][a, q] = sum_{t: g(t) = g} sum_p dV[t, (k, p, a)] U[t, (k, p, q)]

An item is a pair (t, p): at a scale it has k neighbouring numbers of a row. Inactive kernels give zeros, and nothing is
read for them; items whose group does not exist give NaN, and nothing to dKbar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FROM_BATCH, Config, launch

_CORE = Config.of(ITEMS=128, SLOTS=8, num_warps=4, num_stages=1)
_KERNEL_GRAD = Config.of(ITEMS=64, SLOTS=8, num_warps=4, num_stages=1)
#: Rows that a program of the kernels' gradient sums, and partial sums of a layer, at most.
_SPAN = 128
_MOST_SUMS = 4096


@triton.jit
def group_of(groups_ptr, row, inside, segment):
    """The group of each row, int64; 0 for all where there are no groups."""
    group = row * 0
    if groups_ptr is not None:
        group = tl.load(groups_ptr + row // segment, mask=inside, other=-1).to(tl.int64)
    return group


@triton.jit
def apply_kernel(
    source_ptr,  # [ITEMS] pointers to the first of an item's K numbers
    out_ptr,  # [ITEMS] likewise
    kernel_ptr,  # [ITEMS] pointers to the first entry of an item's kernel
    inside,  # [ITEMS] which items there are
    exists,  # [ITEMS] which have a group
    used,  # [ITEMS] which have an active kernel
    K: tl.constexpr,
    LINE: tl.constexpr,
    STEP: tl.constexpr,
    ITEMS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """``out[i] = sum_j kernel[i * LINE + j * STEP] source[j]`` of every item."""
    for i0 in range(0, K, SLOTS):
        i = i0 + tl.arange(0, SLOTS)
        wanted = used[:, None] & (i < K)[None, :]
        sums = tl.zeros((ITEMS, SLOTS), tl.float32)
        for j in range(K):
            source = tl.load(source_ptr + j, mask=used, other=0.0).to(tl.float32)
            entries = tl.load(kernel_ptr[:, None] + (i * LINE + j * STEP)[None, :], mask=wanted, other=0.0)
            sums += source[:, None] * entries.to(tl.float32)
        sums = tl.where(exists[:, None], sums, float("nan"))
        place = out_ptr[:, None] + i[None, :]
        tl.store(place, sums.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (i < K)[None, :])


@triton.jit(do_not_specialize=FROM_BATCH)
def core_kernel(
    u_ptr,  # [rows, WIDTH], or None
    v_ptr,  # [rows, WIDTH] out
    dv_ptr,  # [rows, WIDTH], or None
    du_ptr,  # [rows, WIDTH] out
    folded_ptr,  # [G, FOLDED]
    groups_ptr,  # [rows / segment], or None
    active_ptr,  # [G, S], or None
    rows,
    segment,
    num_groups,
    RANK: tl.constexpr,
    SCALES: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDED: tl.constexpr,
    ITEMS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    row, p = item // RANK, item % RANK
    inside = row < rows
    group = group_of(groups_ptr, row, inside, segment)
    exists = inside & (group >= 0) & (group < num_groups)
    column, entry = 0, 0
    for s in tl.static_range(len(SCALES)):
        if tl.program_id(1) == s:
            used = exists
            if active_ptr is not None:
                used = exists & (tl.load(active_ptr + group * len(SCALES) + s, mask=exists, other=0) != 0)
            place = row * WIDTH + (column + p * SCALES[s])
            kernel_ptr = folded_ptr + (group * FOLDED + entry)
            if u_ptr is not None:
                if tl.program_id(2) == 0:
                    apply_kernel(
                        u_ptr + place,
                        v_ptr + place,
                        kernel_ptr,
                        inside,
                        exists,
                        used,
                        SCALES[s],
                        SCALES[s],
                        1,
                        ITEMS,
                        SLOTS,
                    )
            if dv_ptr is not None:
                if tl.program_id(2) == 1:
                    apply_kernel(
                        dv_ptr + place,
                        du_ptr + place,
                        kernel_ptr,
                        inside,
                        exists,
                        used,
                        SCALES[s],
                        1,
                        SCALES[s],
                        ITEMS,
                        SLOTS,
                    )
        column += RANK * SCALES[s]
        entry += SCALES[s] * SCALES[s]


@triton.jit
def sum_kernel(
    u_ptr,  # the first of rank 0's K numbers in row 0
    dv_ptr,  # likewise
    out_ptr,  # [K, K] out
    groups_ptr,  # [rows / segment], or None
    group,
    segment,
    first,
    end,
    RANK: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ITEMS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """``out[a, q]``: the sum of ``dv[a] u[q]`` over the group's own items from first to end."""
    for a0 in range(0, K, SLOTS):
        a = a0 + tl.arange(0, SLOTS)
        for q0 in range(0, K, SLOTS):
            q = q0 + tl.arange(0, SLOTS)
            sums = tl.zeros((ITEMS, SLOTS, SLOTS), tl.float32)
            for start in range(first, end, ITEMS):
                item = start + tl.arange(0, ITEMS)
                row, p = item // RANK, item % RANK
                own = item < end
                own = own & (group_of(groups_ptr, row, own, segment) == group)
                if tl.max(own.to(tl.int32), 0) > 0:
                    place = (row * WIDTH + p * K)[:, None]
                    dv = tl.load(dv_ptr + place + a[None, :], mask=own[:, None] & (a < K)[None, :], other=0.0)
                    u = tl.load(u_ptr + place + q[None, :], mask=own[:, None] & (q < K)[None, :], other=0.0)
                    sums += dv.to(tl.float32)[:, :, None] * u.to(tl.float32)[:, None, :]
            place = out_ptr + a[:, None] * K + q[None, :]
            tl.store(place, tl.sum(sums, 0), mask=(a < K)[:, None] & (q < K)[None, :])


@triton.jit(do_not_specialize=FROM_BATCH)
def kernel_grad_kernel(
    u_ptr,  # [rows, WIDTH]
    dv_ptr,  # [rows, WIDTH]
    sums_ptr,  # [G, spans, FOLDED] out
    groups_ptr,  # [rows / segment], or None
    active_ptr,  # [G, S], or None
    rows,
    segment,
    spans,
    RANK: tl.constexpr,
    SCALES: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDED: tl.constexpr,
    ITEMS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One group's kernel of one scale, summed over the items of a span of rows that are the group's own."""
    group, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    length = tl.cdiv(rows, spans)
    first = span.to(tl.int64) * length
    last = tl.minimum(first + length, rows)
    column, entry = 0, 0
    out_ptr = sums_ptr + tl.program_id(0).to(tl.int64) * FOLDED
    for s in tl.static_range(len(SCALES)):
        if tl.program_id(1) == s:
            end = last * RANK
            if active_ptr is not None:
                used = tl.load(active_ptr + group.to(tl.int64) * len(SCALES) + s) != 0
                end = tl.where(used, end, 0)
            sum_kernel(
                u_ptr + column,
                dv_ptr + column,
                out_ptr + entry,
                groups_ptr,
                group,
                segment,
                first * RANK,
                end,
                RANK,
                SCALES[s],
                WIDTH,
                ITEMS,
                SLOTS,
            )
        column += RANK * SCALES[s]
        entry += SCALES[s] * SCALES[s]


def _sizes(rows: Tensor, scales: Sequence[int]) -> dict[str, object]:
    """Compile-time arguments that both kernels take."""
    width = rows.shape[1]
    return {
        "RANK": width // sum(scales),
        "SCALES": tuple(scales),
        "WIDTH": width,
        "FOLDED": sum(k * k for k in scales),
    }


def _segment(groups: Tensor | None, rows: int) -> int:
    return rows if groups is None else max(rows // max(groups.shape[0], 1), 1)


def core(U: Tensor, folded: Tensor, groups: Tensor | None, active: Tensor | None, scales: Sequence[int]) -> Tensor:
    V, _, _ = core_backward(U, None, folded, groups, active, scales, (True, False, False))
    assert V is not None
    return V


def core_backward(
    U: Tensor | None,
    dV: Tensor | None,
    folded: Tensor,
    groups: Tensor | None,
    active: Tensor | None,
    scales: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_V, need_dU, need_folded = needs
    V = torch.empty_like(U) if need_V and U is not None else None
    dU = torch.empty_like(dV) if need_dU and dV is not None else None
    groups, active = (None if table is None else table.contiguous() for table in (groups, active))
    like = U if dV is None else dV
    assert like is not None
    sizes, rows = _sizes(like, scales), len(like)
    segment = _segment(groups, rows)
    if V is not None or dU is not None:
        items = triton.cdiv(rows * (like.shape[1] // sum(scales)), _CORE["ITEMS"])
        launch(
            core_kernel,
            (items, len(scales), 1 if dU is None else 2),
            None if V is None else U,
            V,
            None if dU is None else dV,
            dU,
            folded,
            groups,
            active,
            rows,
            segment,
            len(folded),
            config=_CORE,
            **sizes,
        )
    if not need_folded or U is None or dV is None:
        return V, dU, None
    spans = max(1, min(triton.cdiv(rows, _SPAN), _MOST_SUMS // max(len(folded), 1)))
    sums = torch.empty((len(folded), spans, folded.shape[1]), dtype=torch.float32, device=folded.device)
    launch(
        kernel_grad_kernel,
        (len(folded) * spans, len(scales)),
        U,
        dV,
        sums,
        groups,
        active,
        rows,
        segment,
        spans,
        config=_KERNEL_GRAD,
        **sizes,
    )
    return V, dU, sums[:, 0] if spans == 1 else sums.sum(1)
