"""What a task is (its kind, text, labels and metrics), and its rows, checked and in common columns."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListOf

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
    and, for multiple choice, ``choices`` (list of str). ``make_split`` builds them. ``test`` is None where there is no
    labelled test split.

    Raises:
        DataError: a split that is not such a table, or is empty.
    """

    spec: TaskSpec
    train: Dataset
    validation: Dataset
    test: Dataset | None = None

    def __post_init__(self) -> None:
        wanted = {"text", "text_pair", "label", *(["choices"] if self.spec.kind == "multiple_choice" else [])}
        for split in ("train", "validation", "test"):
            table = getattr(self, split)
            if table is None and split == "test":
                continue
            where = f"task {self.spec.name!r}, split {split!r}"
            if not isinstance(table, Dataset):
                raise DataError(f"{where}: must be a datasets.Dataset (see make_split), got {type(table).__name__}")
            missing = sorted(wanted - set(table.column_names))
            if missing:
                raise DataError(f"{where}: no column {missing[0]!r}; there is: {', '.join(table.column_names)}")
            if len(table) == 0:
                raise DataError(f"{where}: no rows; at least one is needed")


def draw(task: str, key: str) -> float:
    """A number in [0, 1) that is the same everywhere: whether a task's rows under ``key`` are held out."""
    digest = hashlib.sha256(f"{task}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def select(tasks: Sequence[str] | None, available: Sequence[str], source: str) -> list[str]:
    """The requested task names, in the order asked for; None means all that are available.

    Raises:
        DataError: a bare string instead of a list, no name, a name twice, or a name that ``source`` does not have.
    """
    if tasks is None:
        return list(available)
    if isinstance(tasks, str):
        raise DataError(f"tasks is the string {tasks!r}; give a list of names, e.g. [{tasks!r}]")
    if not tasks:
        raise DataError(f"tasks is empty; name at least one of: {', '.join(available)} (None means all)")
    repeated = sorted({name for name in tasks if list(tasks).count(name) > 1})
    if repeated:
        raise DataError(f"tasks names {', '.join(repeated)} more than once")
    unknown = [name for name in tasks if name not in available]
    if unknown:
        raise DataError(f"unknown task {', '.join(map(repr, unknown))}; {source} has: {', '.join(available)}")
    return list(tasks)


def make_split(
    spec: TaskSpec,
    split: str,
    *,
    text: Sequence[str],
    label: Sequence[float],
    text_pair: Sequence[str] | None = None,
    choices: Sequence[Sequence[str]] | None = None,
) -> Dataset:
    """Build one split of a task from columns of equal length N >= 1.

    Args:
        spec: the task; if its ``label_range`` is set, regression labels must lie in it.
        split: the split's name, for messages.
        text, text_pair: N strings each; ``text_pair`` None for one-text tasks.
        label: N class indices (integral, in range) or finite numbers.
        choices: N lists of strings, for multiple choice.

    Raises:
        DataError: an empty split, a text that is missing, a label that is not a number or out of range; with its row.
    """
    where = f"task {spec.name!r}, split {split!r}"
    if len(label) == 0:
        raise DataError(f"{where}: no rows; at least one is needed")
    for name, column in (("text", text), ("text_pair", text_pair)):
        wrong = next(((i, value) for i, value in enumerate(column or ()) if not isinstance(value, str)), None)
        if wrong is not None:
            raise DataError(f"{where}, row {wrong[0]}: {name} is {wrong[1]!r}; a string is needed")
        blank = next((i for i, value in enumerate(column or ()) if not value.strip()), None)
        if blank is not None:
            raise DataError(f"{where}, row {blank}: {name} is blank; a text is needed")
    if spec.kind == "multiple_choice":
        _check_choices(where, spec, choices or ())
    labels = _check_labels(where, spec, label, choices)
    columns: dict[str, Any] = {
        "text": list(text),
        "text_pair": list(text_pair or itertools.repeat(None, len(labels))),
        "label": labels,
    }
    features: dict[str, Any] = {
        "text": Value("string"),
        "text_pair": Value("string"),
        "label": Value(str(labels.dtype)),
    }
    if spec.kind == "multiple_choice":
        columns["choices"] = [list(options) for options in choices or ()]
        features["choices"] = ListOf(Value("string"))
    return Dataset.from_dict(columns, features=Features(features))


def _check_choices(where: str, spec: TaskSpec, choices: Sequence[Sequence[str]]) -> None:
    for row, options in enumerate(choices):
        if not isinstance(options, (list, tuple)) or not 2 <= len(options) <= spec.num_labels:
            raise DataError(
                f"{where}, row {row}: choices {options!r} must be 2 to {spec.num_labels} strings (label_names)"
            )
        if not all(isinstance(option, str) for option in options):
            raise DataError(f"{where}, row {row}: choices {options!r} must all be strings")


def _check_labels(
    where: str, spec: TaskSpec, label: Sequence[float], choices: Sequence[Sequence[str]] | None
) -> np.ndarray:
    """Labels as int64 (classes) or float64 (regression), shape [N]."""
    values = np.array([v if isinstance(v, (int, float, np.number)) else np.nan for v in label], dtype=np.float64)
    wrong = ~np.isfinite(values)
    allowed = "a finite number is needed"
    if spec.kind != "regression":
        limits = [len(options) for options in choices] if choices is not None else spec.num_labels
        wrong |= (values != np.floor(values)) | (values < 0) | (values >= limits)
        allowed = f"a class index 0..{spec.num_labels - 1} is needed ({', '.join(spec.label_names or ())})"
        if choices is not None:
            allowed = "an index into the row's choices is needed"
    elif spec.label_range is not None:
        low, high = spec.label_range
        wrong |= (values < low) | (values > high)
        allowed = f"a number from {low} to {high} (label_range) is needed"
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"{where}, row {row}: label is {label[row]!r}; {allowed}")
    return values if spec.kind == "regression" else values.astype(np.int64)
