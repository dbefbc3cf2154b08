"""Task-balanced sampling: every task gets the same share of the training, however many rows it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

TASK_BATCHING = ("mixed", "single")


class TaskBalancedSampler(Sampler[int]):
    """Row indices into the concatenation of T tasks, each task drawn with probability 1/T.

    ``mixed`` draws the task of every sample, ``single`` that of every global batch, the same for all processes. Within
    a task, rows come without replacement in a fresh random order; a task drawn more often than it has rows starts over
    in another order.

    The order is a pure function of (seed, epoch): every process of a distributed run builds the same global order, of
    which the data loader hands it every world_size-th batch, and skipping the batches that a resumed run has already
    seen lands where the run stopped.

    An **epoch** is as many draws as the tasks have rows in total, rounded up to full global batches of
    ``batch_size * world_size``. Small tasks are thus seen several times and large ones in part.

    Args:
        sizes: rows of each task, T positive numbers.
        batch_size: samples of one batch of one process.
        world_size: number of processes that share the order.
        seed: non-negative.
        task_batching: one of ``TASK_BATCHING``.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        *,
        world_size: int = 1,
        seed: int = 0,
        task_batching: str = "mixed",
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes is {list(sizes)}; every task needs at least one row")
        if batch_size < 1 or world_size < 1 or seed < 0:
            raise ValueError(
                f"batch_size {batch_size} and world_size {world_size} must be at least 1, seed {seed} at least 0"
            )
        if task_batching not in TASK_BATCHING:
            raise ValueError(f"task_batching is {task_batching!r}; allowed: {', '.join(TASK_BATCHING)}")
        self.sizes = tuple(sizes)
        self.seed = seed
        self.task_batching = task_batching
        self.epoch = 0
        self.global_batch = batch_size * world_size
        self._length = -(-sum(sizes) // self.global_batch) * self.global_batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> np.ndarray:
        """The current epoch's row indices, int64 ``[len(self)]``."""
        random = np.random.default_rng([self.seed, self.epoch])
        repeats = self.global_batch if self.task_batching == "single" else 1
        tasks = random.integers(len(self.sizes), size=self._length // repeats).repeat(repeats)
        order = np.empty(self._length, dtype=np.int64)
        start = 0
        for task, size in enumerate(self.sizes):
            drawn = tasks == task
            count = int(drawn.sum())
            passes = [random.permutation(size) for _ in range(-(-count // size))]
            order[drawn] = start + np.concatenate([*passes, np.empty(0, np.int64)])[:count]
            start += size
        return order
