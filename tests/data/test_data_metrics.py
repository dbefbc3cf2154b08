"""Metrics against their textbook values, and their edges."""

from __future__ import annotations

import numpy as np
import pytest

from ept.data import TaskSpec, metrics


def _spec(kind="classification", classes=2, scores=("accuracy", "f1", "matthews")):
    labels = tuple(f"class{i}" for i in range(classes)) if kind == "classification" else None
    return TaskSpec("task", kind, ("text",), labels, scores)


REGRESSION = _spec("regression", scores=("pearson", "spearman"))


def test_two_classes():
    labels, predictions = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    scores = metrics.compute(_spec(), predictions, labels)  # tp 2, fp 1, fn 1, tn 2
    assert list(scores) == ["accuracy", "f1", "matthews"]
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["matthews"] == pytest.approx((2 * 2 - 1 * 1) / np.sqrt(3 * 3 * 3 * 3))


def test_three_classes_average_f1_over_classes():
    scores = metrics.compute(_spec(classes=3), np.array([0, 1, 1, 1]), np.array([0, 1, 2, 2]))
    assert scores["f1"] == pytest.approx((1 + 2 / (2 + 2) + 0) / 3)  # class 1: tp 1, fp 2; class 2 is never predicted


def test_logits_and_scores():
    labels = np.array([0, 1, 1])
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [-1.0, -2.0]])
    assert metrics.compute(_spec(), logits, labels) == metrics.compute(_spec(), np.array([0, 1, 0]), labels)
    column = np.array([[0.1], [0.5], [0.9]])
    assert metrics.compute(REGRESSION, column, labels) == metrics.compute(REGRESSION, column[:, 0], labels)


def test_correlations():
    x = np.array([0.0, 1.0, 2.0, 4.0])
    scores = metrics.compute(REGRESSION, x**3, x)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(np.corrcoef(x**3, x)[0, 1])
    assert metrics.compute(REGRESSION, -x, x)["pearson"] == pytest.approx(-1.0)


@pytest.mark.filterwarnings("error")
def test_constant_predictions_score_zero_not_nan():
    x = np.array([0.0, 1.0, 2.0])
    for predictions, labels in ((np.ones(3), x), (x, np.ones(3)), (np.ones(1), np.ones(1))):
        assert metrics.compute(REGRESSION, predictions, labels) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics.compute(_spec(), np.ones(4, int), np.array([0, 1, 1, 1])) == {
        "accuracy": 0.75,
        "f1": pytest.approx(6 / 7),
        "matthews": 0.0,
    }


def test_no_answer_counts_as_wrong():
    scores = metrics.compute(_spec(), np.array([-1, 1]), np.array([0, 1]))
    assert scores["accuracy"] == 0.5 and scores["f1"] == 1.0


def test_baseline_is_the_majority_of_train():
    spec = _spec(scores=("accuracy",))
    assert metrics.baseline(spec, np.array([0, 1, 1]), np.array([0, 0, 0, 1])) == {"accuracy": 0.25}
    assert metrics.baseline(REGRESSION, np.array([0.1, 2.0]), np.array([1.0, 2.0, 4.0]))["pearson"] == 0.0


@pytest.mark.parametrize(
    ("predictions", "labels", "part"),
    [
        (np.zeros(2), np.zeros(3), r"\(2,\)"),
        (np.zeros((3, 5)), np.zeros(3), r"\[N, 2\]"),
        (np.zeros(0), np.zeros(0), "N >= 1"),
        (np.array([0, np.nan]), np.zeros(2), r"predictions\[1\] is nan"),
        (np.zeros(2), np.array([np.inf, 0]), r"labels\[0\] is inf"),
        (np.array([[0, 1], [np.nan, 1]]), np.zeros(2), r"predictions\[1\]"),
    ],
)
def test_bad_input(predictions, labels, part):
    with pytest.raises(ValueError, match=part):
        metrics.compute(_spec(), predictions, labels)


def test_baseline_needs_rows():
    with pytest.raises(ValueError, match="train_labels"):
        metrics.baseline(_spec(), np.zeros(0), np.zeros(2))
