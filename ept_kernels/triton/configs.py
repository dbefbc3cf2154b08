"""Shipped tile sizes: what runs where nobody has tuned. Each is compiled for every target by the static check.

Keyed by what decides whether a tile fits: bytes of an element, columns that a program accumulates, how many rows there
are to share, and the family of the GPU (``target.family``; an unknown one gets the tiles that fit them all).
"""

from __future__ import annotations

from functools import lru_cache

import triton

from .launch import Config
from .plan import Plan
from .target import family

#: Rows of a span of the first stage of dA and dB. A constant, so that sums do not depend on the GPU.
SPAN = 1024
MOST_SPANS = 16


def row_spans(rows: int) -> tuple[int, int]:
    """``(rows of a span, spans)`` of the two-stage sums over ``rows`` rows."""
    spans = min(triton.cdiv(rows, SPAN), MOST_SPANS)
    return (triton.cdiv(rows, spans) if spans else 0), spans


#: Programs that a kernel of few rows should have at least, so that most of a large GPU's processors have one.
MANY_PROGRAMS = 128


def _fitting(block: int, rows: int) -> int:
    """A block of at most ``block`` rows, no larger than a few rows need, and 16 at least (a matrix instruction's)."""
    return min(block, max(16, triton.next_power_of_2(rows)))


def _spreading(block: int, rows: int, programs: int) -> int:
    """A block of at most ``block`` rows, smaller while ``programs`` for each block of rows are too few, 16 at least."""
    while block > 16 and triton.cdiv(rows, block) * programs < MANY_PROGRAMS:
        block //= 2
    return block


def _shrink_rows(plan: Plan, itemsize: int) -> int:
    """Rows that a shrinking program can accumulate in registers: twice as many where matrix instructions leave more.

    A product in three TF32 parts takes them back.
    """
    most = 64 if family() == "wide" and itemsize <= 2 else 32
    return most if plan.block_columns <= 192 else most // 2


def shrink_candidates(plan: Plan, itemsize: int, rows: int, drops: bool) -> list[Config]:
    """Tiles of the shrink kernel, the default first."""
    block = _spreading(_shrink_rows(plan, itemsize), rows, plan.rank_blocks)
    # Many scales, each with addresses of its own, leave fewer registers; dropout's mask is better off with more lanes.
    crowded = plan.block_columns > 192 and not drops and family() != "cdna"
    channels = 64 if itemsize <= 2 and not crowded else 32

    def config(rows: int) -> Config:
        few = family() == "cdna" or (crowded and itemsize <= 2)  # a lane then loads 16 bytes of 16 rows
        warps = {16: 2 if few else 4, 32: 4, 64: 8}[rows]
        return Config.of(BLOCK_T=rows, BLOCK_C=channels, num_warps=warps, num_stages=1)

    return [config(block)] + ([config(block // 2)] if block > 16 else [])


def expand_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the expand kernel, the default first."""
    if itemsize > 2:  # more than 8 outputs a lane in three TF32 parts spill
        return [
            Config.of(BLOCK_T=block, BLOCK_C=64, num_warps=block // 4, num_stages=1)
            for block in sorted({16, _fitting(32, rows)}, reverse=True)
        ]
    channels = 128 if rows > 16 else 64
    return [
        Config.of(BLOCK_T=_fitting(32, rows), BLOCK_C=channels, num_warps=4, num_stages=1),
        Config.of(BLOCK_T=_fitting(64, rows), BLOCK_C=channels, num_warps=8, num_stages=1),
    ]


def linear_candidates(plan: Plan, itemsize: int, rows: int, drops: bool, narrow: bool) -> list[Config]:
    """Tiles of the fused base product, the default first.

    Args:
        drops: the mask of dropout needs registers as well.
        narrow: lines of x, W or y do not start on 16 bytes each, so that their elements are loaded one by one, each
            with an address of its own.
    """
    deep = 2 if family() == "cdna" else 3  # AMD prefetches into registers, so that a stage less is in its 64 KiB
    if itemsize > 2:
        # A product in three TF32 parts holds its operands twice: more than 16 x 4 outputs a warp spill.
        block = _fitting(32, rows)
        tiles = {"BLOCK_T": block, "BLOCK_C": 16, "BLOCK_I": 32, "GROUP_T": 8}
        return [Config.of(**tiles, num_warps=block // 4, num_stages=deep)]
    if rows <= 16:  # reading the weight is all that takes time: many programs, long runs of each row of it
        return [
            Config.of(BLOCK_T=16, BLOCK_C=32, BLOCK_I=128, GROUP_T=8, num_warps=4, num_stages=deep + 1),
            Config.of(BLOCK_T=16, BLOCK_C=64, BLOCK_I=64, GROUP_T=8, num_warps=4, num_stages=deep + 1),
        ]
    if rows <= 64:
        block = _fitting(64, rows)
        return [
            Config.of(BLOCK_T=block, BLOCK_C=64, BLOCK_I=64, GROUP_T=8, num_warps=4, num_stages=deep + 1),
            Config.of(BLOCK_T=block, BLOCK_C=128, BLOCK_I=64, GROUP_T=8, num_warps=4, num_stages=deep),
        ]
    channels = 64 if drops or narrow else 128
    return [
        Config.of(BLOCK_T=128, BLOCK_C=channels, BLOCK_I=64, GROUP_T=8, num_warps=8, num_stages=deep),
        Config.of(BLOCK_T=128, BLOCK_C=channels, BLOCK_I=32, GROUP_T=8, num_warps=8, num_stages=deep + 1),
    ]


def single_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the single launch, the default first."""
    deep = 2 if family() == "cdna" else 3
    shrink = _shrink_rows(plan, itemsize)
    if itemsize > 2:
        # As in the base product alone; the shrink in the same kernel halves the tile once more.
        tiles = {"BLOCK_T": 32, "BLOCK_C": 16, "BLOCK_I": 32, "SHRINK_T": 16, "GROUP_T": 8}
        return [Config.of(**tiles, num_warps=8, num_stages=deep)]
    return [Config.of(BLOCK_T=128, BLOCK_C=64, BLOCK_I=64, SHRINK_T=shrink, GROUP_T=8, num_warps=8, num_stages=deep)]


def factor_grad_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the first stage of dA and dB, the default first."""
    crowded, scales = plan.block_columns > 192, len(plan.scales)
    half, amd = itemsize <= 2, family() == "cdna"
    channels = 32 if crowded or not half else 64
    if not half and not amd:  # a product in three TF32 parts: 32 rows spill, wider tiles or more scales far more
        return [Config.of(BLOCK_T=16, BLOCK_C=32, AT_ONCE=min(scales, 8), num_warps=8, num_stages=2)]
    block = _fitting(32, rows)
    if amd:
        if not half and crowded:
            channels = 16
        lanes = block * channels * itemsize // 16  # each loads 16 bytes
        return [Config.of(BLOCK_T=block, BLOCK_C=channels, AT_ONCE=scales, num_warps=lanes // 64, num_stages=2)]
    small = Config.of(BLOCK_T=block, BLOCK_C=channels, AT_ONCE=scales, num_warps=4, num_stages=2)
    if crowded:
        if block == 16:  # more lanes than loads of 16 bytes otherwise
            return [small]
        # With 4 warps, loading ahead takes the registers that are left.
        tiles = {"BLOCK_T": block, "BLOCK_C": channels, "AT_ONCE": scales}
        return [Config.of(**tiles, num_warps=8, num_stages=2), Config.of(**tiles, num_warps=4, num_stages=1)]
    if family() == "safe":  # wider tiles need fewer registers there: more of the operands are shared
        channels *= 2
    large = {"BLOCK_T": _fitting(64, rows), "BLOCK_C": channels, "AT_ONCE": scales}
    return [Config.of(**large, num_warps=8, num_stages=2), small]


def reduce_config() -> Config:
    """Tiles of the second stage of the parameter gradients."""
    return Config.of(BLOCK_J=64, BLOCK_U=32, BLOCK_F=32, num_warps=4, num_stages=1)


#: Lines of a span of the first stage of a dense update's gradients: a constant multiple of every block.
WEIGHT_SPAN = 256


def weight_candidates(plan: Plan, itemsize: int) -> list[Config]:
    """Tiles of the weight generation, the default first; ranks beyond a block take several rounds."""
    most = 64 if itemsize <= 2 else 32  # three TF32 products of 64 ranks spill on sm_80
    ranks = min(most, max(16, triton.next_power_of_2(plan.rank)))
    wide = Config.of(BLOCK_O=32, BLOCK_I=128, BLOCK_P=ranks, num_warps=8, num_stages=1)
    narrow = Config.of(BLOCK_O=32, BLOCK_I=64, BLOCK_P=ranks, num_warps=4, num_stages=1)
    if plan.rank > ranks and family() == "cdna":  # the loop over rounds leaves too few registers for wide tiles
        return [narrow]
    if len(plan.scales) > 8:  # with 4 warps the addresses of 15 scales spill
        return [wide]
    return [wide, narrow]


def weight_grad_candidates(plan: Plan, itemsize: int) -> list[Config]:
    """Tiles of the first stage of a dense update's gradients, the default first; a program serves one scale."""
    columns = max(rank * slot for rank, slot in zip(plan.ranks, plan.slots, strict=True))
    block = 64 if itemsize <= 2 and columns <= 64 else 32
    # With 4 warps sm_100 spills a few registers.
    return [Config.of(BLOCK_T=block, BLOCK_C=block, num_warps=8, num_stages=stages) for stages in (2, 1)]


# The kernels that route and fold take microseconds, and Triton's own rounding would be noticed: it is done once.


def _fold_blocks(experts: int, entries: int) -> tuple[int, int]:
    """``(BLOCK_E, BLOCK_F)``: all experts, and as many entries of a folded kernel as make a tile of 4096."""
    block = triton.next_power_of_2(experts)
    return block, min(4096 // block, triton.next_power_of_2(entries))


@lru_cache
def fold_config(experts: int, width: int, entries: int, scales: int) -> Config:
    """Tiles of the kernel that routes and folds. Few programs run, each alone: what counts is loads in flight."""
    block, block_entries = _fold_blocks(experts, entries)
    return Config.of(
        BLOCK_E=block,
        BLOCK_D=min(8192 // block, triton.next_power_of_2(width)),
        BLOCK_F=block_entries,
        BLOCK_S=triton.next_power_of_2(scales),
        num_warps=8,
        num_stages=1,
    )


@lru_cache
def logits_grad_config(experts: int, entries: int) -> Config:
    """Tiles of the router's gradient, a program a group."""
    block, block_entries = _fold_blocks(experts, entries)
    return Config.of(BLOCK_E=block, BLOCK_F=block_entries, num_warps=4, num_stages=1)


@lru_cache
def fold_grad_config(experts: int) -> Config:
    """Tiles of the sums over groups that give the gradients of kernels, gate and embeddings."""
    block = triton.next_power_of_2(experts)
    return Config.of(BLOCK_E=block, BLOCK_G=16, BLOCK_P=64, BLOCK_W=128, num_warps=4, num_stages=1)
