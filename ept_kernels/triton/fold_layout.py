"""Where the kernels that route and fold find the numbers of each expert: small tables on the device, made once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import PyramidGeometry


class Layout(NamedTuple):
    """Where the numbers of a layer's kernels are, on its device; kernels packed one after the other have P numbers.

    Attributes:
        source: ``[E, folded_size]`` int32, the packed place of an expert's part of a folded entry; -1: it has none.
        scale: ``[E]`` int32, index of the expert's scale. factor: ``[E]`` fp32, ``alpha / r`` times its ALP factor.
        expert, entry: ``[P]`` int32, the expert of a packed number, and the folded entry that it goes to.
    """

    source: Tensor
    scale: Tensor
    factor: Tensor
    expert: Tensor
    entry: Tensor


@lru_cache(maxsize=1024)
def layout_for(geometry: PyramidGeometry, scaling: float, device: torch.device) -> Layout:
    """The tables of a layer; only the first call for a device copies them there."""
    source: list[list[int]] = []
    expert: list[int] = []
    entry: list[int] = []
    for e, (k, s) in enumerate(zip(geometry.kernel_sizes, geometry.expert_scale, strict=True)):
        before, start, size = geometry.offsets[s], len(expert), k * k
        after = geometry.folded_size - before - size
        source.append([-1] * before + list(range(start, start + size)) + [-1] * after)
        expert += [e] * size
        entry += range(before, before + size)
    factor = [scaling * geometry.alp_factors[s] for s in geometry.expert_scale]
    whole: Any = {"dtype": torch.int32, "device": device}
    return Layout(
        torch.tensor(source, **whole),
        torch.tensor(geometry.expert_scale, **whole),
        torch.tensor(factor, dtype=torch.float32, device=device),
        torch.tensor(expert, **whole),
        torch.tensor(entry, **whole),
    )


def fold_blocks(experts: int, entries: int) -> tuple[int, int]:
    """``(BLOCK_E, BLOCK_F)``: all experts, and as many entries of a folded kernel as make a tile of 4096."""
    block = triton.next_power_of_2(experts)
    return block, min(4096 // block, triton.next_power_of_2(entries))


@triton.jit
def task_of(tasks_ptr, first_task, group, mask):
    """The tasks of some groups, int64; -1 where masked."""
    if tasks_ptr is None:
        task = tl.where(mask, first_task + group, -1).to(tl.int64)
    else:
        task = tl.load(tasks_ptr + group, mask=mask, other=-1).to(tl.int64)
    return task
