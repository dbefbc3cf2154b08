"""Tiles of the kernels that route and fold."""

from __future__ import annotations

from functools import lru_cache

import triton

from .launch import Config

# The kernels that route and fold take microseconds, and Triton's own rounding would be noticed: it is done once.


def _fold_blocks(experts: int, entries: int) -> tuple[int, int]:
    """``(BLOCK_E, BLOCK_F)``: all experts, and as many entries of a folded kernel as make a tile of 4096."""
    block = triton.next_power_of_2(experts)
    return block, min(4096 // block, triton.next_power_of_2(entries))


@lru_cache
def fold_config(experts: int, width: int, entries: int, scales: int) -> Config:
    """Tiles of the kernel that routes and folds. Few programs run, each alone: what counts is loads in flight."""
    block, block_entries = _fold_blocks(experts, entries)
    block_width, block_scales = min(8192 // block, triton.next_power_of_2(width)), triton.next_power_of_2(scales)
    return Config.of(BLOCKS=(block, block_width, block_entries, block_scales), num_warps=8, num_stages=1)


@lru_cache
def logits_grad_config(experts: int, entries: int) -> Config:
    """Tiles of the router's gradient, a program a group."""
    block, block_entries = _fold_blocks(experts, entries)
    return Config.of(BLOCK_E=block, BLOCK_F=block_entries, num_warps=4, num_stages=1)


@lru_cache
def fold_grad_config(experts: int) -> Config:
    """Tiles of the sums over groups that give the gradients of kernels, gate and embeddings."""
    block = triton.next_power_of_2(experts)
    return Config.of(BLOCKS=(block, 16, 64, 128), num_warps=4, num_stages=1)
