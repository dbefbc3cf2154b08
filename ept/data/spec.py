"""What a task is: its kind, its text, its labels and how it is scored."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from datasets import Dataset

KINDS = ("classification", "regression", "multiple_choice")
METRICS_OF_KIND = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "multiple_choice": ("accuracy",),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class DataError(ValueError):
    """A task, a data folder or a data source is not what it must be; the message says what is allowed."""


@dataclass(frozen=True)
class TaskSpec:
    """Static description of one task.

    Attributes:
        name: letters, digits, ``_`` and ``-``; names the task's head and its row of the task-embedding table.
        kind: one of ``KINDS``.
        text_columns: what the texts are called, in order: one or two; for multiple choice question and choices.
        label_names: class names by class index (for multiple choice the printed letters); None for regression.
        metrics: of ``METRICS_OF_KIND[kind]``; the first is the headline.
        label_range: lowest and highest possible label, regression only.

    Raises:
        DataError: a field is not as above.
    """

    name: str
    kind: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    label_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise DataError(f"task name {self.name!r}: only letters, digits, '_' and '-', a letter or digit first")
        if self.kind not in KINDS:
            raise DataError(f"task {self.name!r}: unknown kind {self.kind!r}; allowed: {', '.join(KINDS)}")
        self._check_columns()
        self._check_labels()
        allowed = METRICS_OF_KIND[self.kind]
        if not self.metrics or any(metric not in allowed for metric in self.metrics):
            raise DataError(
                f"task {self.name!r}: metrics {self.metrics!r}; a {self.kind} task allows {', '.join(allowed)}"
            )

    @property
    def num_labels(self) -> int:
        """Outputs of a head for this task: the number of classes, 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)

    def _check_columns(self) -> None:
        allowed = (2,) if self.kind == "multiple_choice" else (1, 2)
        if len(self.text_columns) not in allowed or len(set(self.text_columns)) != len(self.text_columns):
            meaning = (
                "the question and its choices" if self.kind == "multiple_choice" else "one or two different columns"
            )
            raise DataError(f"task {self.name!r}: text_columns {list(self.text_columns)!r} must name {meaning}")

    def _check_labels(self) -> None:
        if self.kind == "regression":
            if self.label_names is not None:
                raise DataError(f"task {self.name!r}: label_names must be None (null) for regression")
            if self.label_range is not None:
                low, high = self.label_range
                if not (math.isfinite(low) and math.isfinite(high) and low < high):
                    raise DataError(f"task {self.name!r}: label_range {self.label_range!r} must be finite and rising")
            return
        if self.label_range is not None:
            raise DataError(f"task {self.name!r}: label_range is for regression tasks, not for {self.kind}")
        names = self.label_names or ()
        keys = {name.strip().casefold() for name in names if isinstance(name, str)}
        if len(names) < 2 or len(keys) != len(names) or "" in keys:
            raise DataError(
                f"task {self.name!r}: label_names {names!r} must be at least two different, non-empty names"
            )


@dataclass(frozen=True)
class TaskData:
    """One task with its rows.

    Every split has the columns ``text`` (str), ``text_pair`` (str or None), ``label`` (int64 class index or float64)
    and, for multiple choice, ``choices`` (list of str). ``test`` is None where there is no labelled test split.
    """

    spec: TaskSpec
    train: Dataset
    validation: Dataset
    test: Dataset | None = None
