"""Rows of one or several tasks as a map-style dataset whose items know their task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset as Table
from torch.utils.data import Dataset

from ept.data import TaskData


class TaskRows(Dataset):
    """Concatenation of tables in the common columns of ``ept.data``; items are dicts with an added int ``task_id``.

    Args:
        tables: one per task; rows of ``tables[i]`` get the id ``task_ids[i]``.
        task_ids: as many ids.
    """

    def __init__(self, tables: Sequence[Table], task_ids: Sequence[int]) -> None:
        self.sizes = tuple(len(table) for table in tables)
        self._tables = tuple(tables)
        self._task_ids = tuple(task_ids)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        row = self._tables[place][int(index - self._ends[place] + self.sizes[place])]
        return {**row, "task_id": self._task_ids[place]}


def training_rows(tasks: Sequence[TaskData], task_ids: Sequence[int]) -> TaskRows:
    """The train splits of all tasks, under one id each."""
    return TaskRows([task.train for task in tasks], task_ids)


def evaluation_rows(task: TaskData, task_id: int, limit: int | None = None) -> TaskRows:
    """A task's validation split: all rows, or ``limit`` of them drawn once and for all, ordered by length.

    The draw depends on nothing but the split's size, so every evaluation scores the same rows. Neighbours of similar
    length keep padding, and with it the cost, low.
    """
    table = task.validation
    chosen = np.arange(len(table))
    if limit is not None and limit < len(table):
        chosen = np.random.default_rng(0).permutation(len(table))[:limit]
    lengths = np.array(
        [len(text) + len(pair or "") for text, pair in zip(table["text"], table["text_pair"], strict=True)]
    )
    chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    return TaskRows([table.select(chosen)], [task_id])
