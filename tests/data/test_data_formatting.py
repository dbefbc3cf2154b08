"""Prompts, targets, and reading them back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ept.data import TaskSpec, parse_target, prompt, target

COLA = TaskSpec("cola", "classification", ("sentence",), ("unacceptable", "acceptable"), ("matthews",))
MRPC = TaskSpec("mrpc", "classification", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy",))
STSB = TaskSpec("stsb", "regression", ("sentence1", "sentence2"), None, ("pearson",), (0.0, 5.0))
QUIZ = TaskSpec("quiz", "multiple_choice", ("question", "choices"), tuple("ABCDE"), ("accuracy",))


def test_prompts():
    assert prompt(COLA, {"text": "Hi.", "text_pair": None}) == "cola sentence: Hi. answer:"
    assert prompt(MRPC, {"text": "a", "text_pair": "b"}) == "mrpc sentence1: a sentence2: b answer:"
    row = {"text": "2+2?", "text_pair": None, "choices": ["3", "4"]}
    assert prompt(QUIZ, row) == "quiz question: 2+2? choices: A) 3 B) 4 answer:"


@pytest.mark.parametrize(
    ("spec", "label", "text"),
    [(COLA, 1, "acceptable"), (QUIZ, 1, "B"), (STSB, 3.75, "3.8"), (STSB, 5.0, "5.0"), (STSB, 0.05, "0.0")],
)
def test_targets(spec, label, text):
    assert target(spec, {"label": label}) == text


@pytest.mark.parametrize(
    ("low", "high", "label", "text"),
    [
        (-4, 4, -1.26, "-1.2"),
        (-4, 4, -0.05, "0.0"),
        (0, 1, 0.333, "0.34"),
        (0, 100, 33.3, "34"),
        (0, 1e6, 123456, "120000"),
    ],
)
def test_step_follows_the_range(low, high, label, text):
    spec = TaskSpec("t", "regression", ("text",), None, ("pearson",), (low, high))
    assert target(spec, {"label": label}) == text


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        (COLA, "  Acceptable.\nNext", 1),
        (COLA, "answer: unacceptable", 0),
        (COLA, "it is acceptable", None),
        (COLA, "acceptably", None),
        (COLA, "", None),
        (MRPC, "not_equivalent", 0),
        (MRPC, "equivalent!", 1),
        (QUIZ, "(b) because", 1),
        (QUIZ, "E) none", 4),
        (QUIZ, "F", None),
        (QUIZ, "Apple", None),
        (STSB, "about 3.8 of 5", 3.8),
        (STSB, "-2", 0.0),
        (STSB, "7", 5.0),
        (STSB, ".5", 0.5),
        (STSB, "9" * 400, None),
        (STSB, "high", None),
    ],
)
def test_parsing(spec, text, value):
    assert parse_target(spec, text) == value


def test_longest_name_wins():
    spec = TaskSpec("t", "classification", ("text",), ("very", "very good"), ("accuracy",))
    assert parse_target(spec, "Very good indeed") == 1


names = st.lists(
    st.text(min_size=1).filter(str.strip), min_size=2, max_size=6, unique_by=lambda n: n.strip().casefold()
)


@given(names=names, data=st.data())
def test_every_class_is_read_back(names, data):
    spec = TaskSpec("t", "classification", ("text",), tuple(names), ("accuracy",))
    label = data.draw(st.integers(0, len(names) - 1))
    assert parse_target(spec, f" {target(spec, {'label': label})}\n") == label


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), share=st.floats(0, 1))
def test_every_number_is_read_back_to_half_a_step(low, width, share):
    spec = TaskSpec("t", "regression", ("text",), None, ("pearson",), (low, low + width))
    label = min(low + share * width, low + width)
    value = parse_target(spec, target(spec, {"label": label}))
    assert abs(value - label) <= width / 15
    again = parse_target(spec, target(spec, {"label": value}))
    assert abs(again - value) <= width / 15


@given(st.text())
def test_any_text_can_be_parsed(text):
    for spec in (COLA, MRPC, QUIZ):
        value = parse_target(spec, text)
        assert value is None or 0 <= value < spec.num_labels
    number = parse_target(STSB, text)
    assert number is None or 0.0 <= number <= 5.0
