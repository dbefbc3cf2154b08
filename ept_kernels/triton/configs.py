"""Shipped tile sizes: what runs where nobody has tuned. Each is compiled for every target by the static check.

Keyed by what decides whether a tile fits: bytes of an element, columns that a program accumulates, and how many rows
there are to share. Nothing here depends on the GPU's name, so an unknown GPU gets the same safe tiles.
"""

from __future__ import annotations

import triton

from .launch import Config
from .plan import Plan

#: Rows of a span of the first stage of dA and dB. A constant, so that sums do not depend on the GPU.
SPAN = 1024
MOST_SPANS = 16


def row_spans(rows: int) -> tuple[int, int]:
    """``(rows of a span, spans)`` of the two-stage sums over ``rows`` rows."""
    spans = min(triton.cdiv(rows, SPAN), MOST_SPANS)
    return (triton.cdiv(rows, spans) if spans else 0), spans


def _fitting(block: int, rows: int) -> int:
    """A block of at most ``block`` rows, no larger than a few rows need, and 16 at least (a matrix instruction's)."""
    return min(block, max(16, triton.next_power_of_2(rows)))


def shrink_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the shrink kernel, the default first."""
    most = 64 if plan.block_columns <= 192 else 32 if plan.block_columns <= 384 else 16
    block = _fitting(most, rows)
    channels = 64 if itemsize <= 2 else 32
    candidates = [Config.of(BLOCK_T=block, BLOCK_C=channels, num_warps=4, num_stages=1)]
    if block == 64:
        candidates.append(Config.of(BLOCK_T=64, BLOCK_C=channels, num_warps=8, num_stages=1))
    return candidates


def expand_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the expand kernel, the default first."""
    channels = 128 if itemsize <= 2 else 64
    return [
        Config.of(BLOCK_T=_fitting(64, rows), BLOCK_C=channels, num_warps=4, num_stages=1),
        Config.of(BLOCK_T=_fitting(32, rows), BLOCK_C=channels, num_warps=4, num_stages=1),
    ]


def linear_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the fused base product, the default first."""
    if itemsize > 2:
        return [
            Config.of(BLOCK_T=_fitting(64, rows), BLOCK_C=64, BLOCK_I=32, GROUP_T=8, num_warps=4, num_stages=3),
        ]
    if rows <= 64:
        block = _fitting(64, rows)
        return [
            Config.of(BLOCK_T=block, BLOCK_C=64, BLOCK_I=64, GROUP_T=8, num_warps=4, num_stages=4),
            Config.of(BLOCK_T=block, BLOCK_C=128, BLOCK_I=64, GROUP_T=8, num_warps=4, num_stages=3),
        ]
    return [
        Config.of(BLOCK_T=128, BLOCK_C=128, BLOCK_I=64, GROUP_T=8, num_warps=8, num_stages=3),
        Config.of(BLOCK_T=128, BLOCK_C=256, BLOCK_I=64, GROUP_T=8, num_warps=8, num_stages=3),
        Config.of(BLOCK_T=128, BLOCK_C=128, BLOCK_I=32, GROUP_T=8, num_warps=4, num_stages=4),
    ]


def single_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the single launch, the default first."""
    shrink = 64 if plan.block_columns <= 192 else 32 if plan.block_columns <= 384 else 16
    if itemsize > 2:
        return [Config.of(BLOCK_T=64, BLOCK_C=64, BLOCK_I=32, SHRINK_T=shrink, GROUP_T=8, num_warps=8, num_stages=3)]
    tiles = {"BLOCK_T": 128, "BLOCK_I": 64, "SHRINK_T": shrink, "GROUP_T": 8}
    return [Config.of(BLOCK_C=columns, **tiles, num_warps=8, num_stages=3) for columns in (128, 256)]


def factor_grad_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the first stage of dA and dB, the default first."""
    channels = 64 if plan.block_columns <= 192 else 32
    depth = 64 if itemsize <= 2 else 32
    return [
        Config.of(BLOCK_T=_fitting(depth, rows), BLOCK_C=channels, num_warps=4, num_stages=2),
        Config.of(BLOCK_T=_fitting(depth, rows), BLOCK_C=channels, num_warps=8, num_stages=2),
    ]


def reduce_config() -> Config:
    """Tiles of the second stage of the parameter gradients."""
    return Config.of(BLOCK_J=64, BLOCK_U=32, BLOCK_F=32, num_warps=4, num_stages=1)


#: Lines of a span of the first stage of a dense update's gradients: a constant multiple of every block.
WEIGHT_SPAN = 256


def weight_candidates(plan: Plan, itemsize: int) -> list[Config]:
    """Tiles of the weight generation, the default first; ranks beyond a block take several rounds."""
    most = 64 if itemsize <= 2 else 32  # three TF32 products of 64 ranks spill on sm_80
    ranks = min(most, max(16, triton.next_power_of_2(plan.rank)))
    return [
        Config.of(BLOCK_O=32, BLOCK_I=128, BLOCK_P=ranks, num_warps=8, num_stages=1),
        Config.of(BLOCK_O=32, BLOCK_I=64, BLOCK_P=ranks, num_warps=4, num_stages=1),
    ]


def weight_grad_candidates(plan: Plan, itemsize: int) -> list[Config]:
    """Tiles of the first stage of a dense update's gradients, the default first; a program serves one scale."""
    columns = max(rank * slot for rank, slot in zip(plan.ranks, plan.slots, strict=True))
    block = 64 if itemsize <= 2 and columns <= 64 else 32
    # With 4 warps sm_100 spills a few registers.
    return [Config.of(BLOCK_T=block, BLOCK_C=block, num_warps=8, num_stages=stages) for stages in (2, 1)]
