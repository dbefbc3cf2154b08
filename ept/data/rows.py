"""The one place where rows are checked and brought into the common columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListOf

from ept.data.spec import DataError, TaskSpec


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
