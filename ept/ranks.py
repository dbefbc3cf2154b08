"""Sums over the processes of a distributed run, for values that a method defines over the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def number_of_ranks() -> int:
    """Processes in the default group of a ``torch.distributed`` job; 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's ``x``, bit-identical on all of them; ``x`` itself where there is one rank.

    Every process of the default group must call it in the same order. Differentiable: with ranks whose gradients are
    averaged afterwards, as data-parallel training does, the result is the gradient of the mean of their losses.
    """
    return x if number_of_ranks() == 1 else _SumOverRanks.apply(x)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOverRanks.apply(grad)
