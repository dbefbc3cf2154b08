"""Scores of one task, and what a model that ignores its input would score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .spec import TaskSpec


def compute(spec: TaskSpec, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics in the order of ``spec.metrics``; the first is the headline.

    Args:
        spec: the task.
        predictions: ``[N]`` class indices or numbers, or a head's output ``[N, num_labels]`` (the largest logit is the
            class; one column is squeezed for regression). The class -1 means "no answer" and counts as wrong.
        labels: ``[N]`` class indices or numbers.

    F1 is that of class 1 for two classes, the unweighted mean over the classes for more. Correlations and Matthews of
    constant predictions (or labels) are undefined; they are given as 0, that is, nothing learned.

    Raises:
        ValueError: N is 0, the shapes do not fit, or a prediction or label is not finite.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim == 2 and predictions.shape[1] == spec.num_labels:
        _check_finite(spec, "predictions", predictions)
        predictions = predictions[:, 0] if spec.kind == "regression" else predictions.argmax(axis=1)
    if labels.ndim != 1 or len(labels) == 0 or predictions.shape != labels.shape:
        raise ValueError(
            f"task {spec.name!r}: predictions {predictions.shape} and labels {labels.shape} must both be [N], N >= 1, "
            f"or predictions [N, {spec.num_labels}]"
        )
    _check_finite(spec, "predictions", predictions)
    _check_finite(spec, "labels", labels)
    return {name: measure(name, predictions, labels, spec.num_labels) for name in spec.metrics}


def measure(metric: str, predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> float:
    """One metric of ``predictions [N]`` as ``compute`` defines it, of input that it has checked."""
    return float(_METRICS[metric](num_labels, predictions, labels))


def baseline(spec: TaskSpec, train_labels: np.ndarray, eval_labels: np.ndarray) -> dict[str, float]:
    """The metrics of the best constant answer: the most frequent class of ``train_labels``, or their mean.

    Both are ``[N]``. For regression this is correlation 0 by the convention of `compute`.
    """
    train_labels, eval_labels = np.asarray(train_labels), np.asarray(eval_labels)
    if train_labels.ndim != 1 or len(train_labels) == 0:
        raise ValueError(f"task {spec.name!r}: train_labels {train_labels.shape} must be [N], N >= 1")
    constant = train_labels.mean() if spec.kind == "regression" else np.bincount(train_labels.astype(np.int64)).argmax()
    return compute(spec, np.full(eval_labels.shape, constant), eval_labels)


def _check_finite(spec: TaskSpec, name: str, values: np.ndarray) -> None:
    wrong = ~np.isfinite(values.astype(np.float64))
    if wrong.any():
        row = int(np.argwhere(wrong)[0, 0])
        raise ValueError(f"task {spec.name!r}: {name}[{row}] is {values[row]}; finite numbers are needed")


def _f1(num_labels: int, predictions: np.ndarray, labels: np.ndarray) -> float:
    classes = [1] if num_labels == 2 else list(range(num_labels))
    return f1_score(labels, predictions, labels=classes, average="macro", zero_division=0)


def _correlation(measure: Callable[[np.ndarray, np.ndarray], tuple[float, float]]) -> Callable[..., float]:
    def score(_: int, predictions: np.ndarray, labels: np.ndarray) -> float:
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        return measure(predictions.astype(np.float64), labels.astype(np.float64))[0]

    return score


_METRICS: dict[str, Callable[[int, np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda _, predictions, labels: accuracy_score(labels, predictions),
    "f1": _f1,
    "matthews": lambda _, predictions, labels: matthews_corrcoef(labels, predictions),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
