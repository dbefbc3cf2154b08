"""``TaskMixture``: samples that belong to no single task, as weights over the tasks that there are."""

from __future__ import annotations

import torch
from torch import Tensor

from ept_kernels import without_autocast


class TaskMixture:
    """Every sample's weights over the tasks; may be given as ``task_ids``.

    A layer folds each task's kernels once and mixes the folded kernels, in which the update is linear. The op then runs
    as for ids, with one row of kernels a sample. One-hot rows give the same as ids.

    Args:
        weights: ``[N, T]``, any floating dtype, rows of non-negative numbers that sum to 1 (not checked: that would
            read the device).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not 2-D.
    """

    def __init__(self, weights: Tensor) -> None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(f"weights must be a floating-point tensor, got {getattr(weights, 'dtype', type(weights))}")
        if weights.dim() != 2:
            raise ValueError(f"weights must be [samples, tasks], got {list(weights.shape)}")
        self.weights = weights

    def __len__(self) -> int:
        return self.weights.shape[0]

    def __repr__(self) -> str:
        return f"TaskMixture({len(self)} samples, {self.weights.shape[1]} tasks)"

    def every_task(self) -> Tensor:
        """The ids of all tasks, int64 ``[T]``."""
        return torch.arange(self.weights.shape[1], device=self.weights.device)

    def most_likely(self) -> Tensor:
        """The task of the largest weight of every sample, int64 ``[N]``."""
        return self.weights.argmax(1)

    def mix(self, rows: Tensor) -> Tensor:
        """Weighted sums of ``rows [T, ...]``, one row a task: ``[N, ...]`` in their dtype, never below fp32 inside."""
        with without_autocast(rows.device):
            dtype = torch.promote_types(rows.dtype, torch.float32)
            mixed = self.weights.to(rows.device, dtype) @ rows.reshape(len(rows), -1).to(dtype)
        return mixed.to(rows.dtype).reshape(len(self), *rows.shape[1:])

    def mix_any(self, flags: Tensor) -> Tensor:
        """Whether any task of a sample has the flag: bool ``[T, ...]`` -> ``[N, ...]``."""
        return self.mix(flags.float()) > 0
