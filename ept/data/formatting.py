"""Tasks as text to text: prompt, target and the way back, for T5-like and causal models.

    "mrpc sentence1: ... sentence2: ... answer:"                 ->  "equivalent"
    "stsb sentence1: ... sentence2: ... answer:"                 ->  "3.8"
    "arc_e question: ... choices: A) ... B) ... answer:"         ->  "B"

The prefix is T5's; the closing "answer:" tells a causal model that its turn has come.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .spec import TaskSpec

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_LEAD = re.compile(r"^(?:answer\s*:)?[\s\"'(\[]*")


def prompt(spec: TaskSpec, row: Mapping[str, Any]) -> str:
    """The question put to a text-to-label model; ``row`` has ``text``, ``text_pair`` and, if needed, ``choices``."""
    parts = [spec.name, f"{spec.text_columns[0]}: {row['text']}"]
    if spec.kind == "multiple_choice":
        letters = (spec.label_names or ())[: len(row["choices"])]
        options = " ".join(f"{letter}) {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
        parts.append(f"{spec.text_columns[1]}: {options}")
    elif row["text_pair"] is not None:
        parts.append(f"{spec.text_columns[1]}: {row['text_pair']}")
    return " ".join([*parts, "answer:"])


def target(spec: TaskSpec, row: Mapping[str, Any]) -> str:
    """The wanted answer: the class name, the choice's letter, or the number rounded to the task's step.

    The step is T5's 0.2 for ranges of about 2 to 15 (0..5, -4..4), and 0.2 times a power of ten for others, so that a
    range always has some 8 to 80 different answers.
    """
    if spec.label_names is not None:
        return spec.label_names[row["label"]]
    exponent = _step_exponent(spec)
    steps = round(row["label"] / (0.2 * 10.0**exponent))
    return f"{steps * 0.2 * 10.0**exponent + 0.0:.{max(0, 1 - exponent)}f}"


def parse_target(spec: TaskSpec, text: str) -> int | float | None:
    """Read an answer back: a class index, a number within the label range, or None if there is neither.

    Tolerant to case, surrounding blanks, an opening "answer:", quotes or brackets, and anything that follows: a class
    answer must begin with a class name, of several the longest; a number is the first one in the text.
    """
    if spec.kind == "regression":
        return _parse_number(spec, text)
    names = [name.strip().casefold() for name in spec.label_names or ()]
    answer = text.strip().casefold()
    for candidate in (answer, _LEAD.sub("", answer)):
        if candidate in names:
            return names.index(candidate)
        begun = [name for name in names if re.match(rf"{re.escape(name)}(?!\w)", candidate)]
        if begun:
            return names.index(max(begun, key=len))
    return None


def _parse_number(spec: TaskSpec, text: str) -> float | None:
    found = _NUMBER.search(text)
    value = float(found.group()) if found else math.nan
    if not math.isfinite(value):
        return None
    if spec.label_range is not None:
        value = min(max(value, spec.label_range[0]), spec.label_range[1])
    return value


def _step_exponent(spec: TaskSpec) -> int:
    """e such that 0.2 * 10**e is the step of the task's answers."""
    if spec.label_range is None:
        return 0
    return round(math.log10((spec.label_range[1] - spec.label_range[0]) / 5.0))
