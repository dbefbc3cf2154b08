"""Shipped tile sizes: what runs where nobody has tuned. Each is compiled for every target by the static check.

Keyed by what decides whether a tile fits: bytes of an element, columns that a program accumulates, and how many rows
there are to share. Nothing here depends on the GPU's name, so an unknown GPU gets the same safe tiles.
"""

from __future__ import annotations

import torch
import triton

from .launch import Config
from .plan import Plan

#: Rows are bucketed, so that a new batch size is not a new configuration.
ROW_BUCKETS = (16, 64, 512)


def shrink_candidates(plan: Plan, itemsize: int, rows: int) -> list[Config]:
    """Tiles of the shrink kernel, the default first."""
    if plan.block_columns > 384:
        block = 16
    elif plan.block_columns > 192:
        block = 32
    else:
        block = 64
    block = min(block, max(16, triton.next_power_of_2(rows)))
    warps = 4
    channels = 64 if itemsize <= 2 else 32
    default = Config.of(BLOCK_T=block, BLOCK_C=channels, num_warps=warps, num_stages=1)
    wider = Config.of(BLOCK_T=block, BLOCK_C=channels, num_warps=8, num_stages=1)
    return [default, wider] if block == 64 else [default]


def shrink_config(dtype: torch.dtype, device: torch.device, plan: Plan, rows: int) -> Config:
    """The tiles that ``shrink`` uses."""
    return shrink_candidates(plan, dtype.itemsize, rows)[0]
