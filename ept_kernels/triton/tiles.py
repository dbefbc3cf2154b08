"""Tiles that several kernels generate in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread(
    factor_ptr,
    stride_p,
    stride_j,
    p0,
    c0,
    rank,
    features,
    K: tl.constexpr,
    SLOT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``F[(p, q), c] = factor[p, c // K] * (c % K == q)`` for channels c0, c0 + 1, ...: ``[RANK * SLOT, BLOCK_C]``.

    Where K divides the block, each entry of the slice is loaded once and repeated along c by broadcast. Other scales
    load K neighbouring copies, which are one word to the lanes that read it.
    """
    c = c0 + tl.arange(0, BLOCK_C)
    p = p0 + tl.arange(0, RANK)
    if BLOCK_C % K == 0:
        j = c0 // K + tl.arange(0, BLOCK_C // K)
        inside = (p[:, None] < rank) & (j[None, :] * K < features)
        part = tl.load(factor_ptr + p[:, None] * stride_p + j[None, :] * stride_j, mask=inside, other=0.0).to(DTYPE)
        repeated = tl.broadcast_to(part[:, :, None], (RANK, BLOCK_C // K, K)).reshape(RANK, BLOCK_C)
    else:
        inside = (p[:, None] < rank) & (c[None, :] < features)
        offsets = p[:, None] * stride_p + (c // K)[None, :] * stride_j
        repeated = tl.load(factor_ptr + offsets, mask=inside, other=0.0).to(DTYPE)
    slot = tl.arange(0, SLOT)
    own = slot[None, :, None] == (c % K)[None, None, :]
    return tl.where(own, repeated[:, None, :], 0.0).reshape(RANK * SLOT, BLOCK_C)


@triton.jit
def is_active(kernel_ptr, K: tl.constexpr, SLOT: tl.constexpr):
    """Whether a folded kernel ``[K, K]`` has an entry that is not zero (NaN counts): else its scale can be skipped."""
    entry = tl.arange(0, SLOT * SLOT)
    values = tl.load(kernel_ptr + entry, mask=entry < K * K, other=0.0)
    return tl.max((values != 0).to(tl.int32), 0) > 0


@triton.jit
def block_columns(p0, rank, K: tl.constexpr, SLOT: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """Columns of a scale's block in a row of intermediates, relative to the scale's first, and which of them exist."""
    n = tl.arange(0, RANK * SLOT)
    p, q = n // SLOT, n % SLOT
    exists = (p < RANK_BLOCK) & (p0 + p < rank) & (q < K)
    return (p0 + p) * K + q, exists


@triton.jit
def keep_mask(seed, rows, columns, p_drop):
    """Entries ``[rows, columns]`` that dropout keeps: Philox of their coordinates, so that any tile replays them."""
    row = rows.to(tl.int64)[:, None]
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    column = columns.to(tl.uint32)[None, :]
    c0, c1, c2 = column + low * 0, low + column * 0, high + column * 0
    random, _, _, _ = tl.philox(seed, c0, c1, c2, c2 * 0)
    return tl.uint_to_uniform_float(random) >= p_drop
