"""What the benchmarks that train share: the trainer's arguments on any device, a run's device, and standard errors."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ept.training import EPTTrainingArguments
from ept.training.options import RunSettings
from ept.training.report import device_name, versions
from ept.training.run import training_arguments


def arguments(settings: RunSettings, *, bf16: bool) -> EPTTrainingArguments:
    """``training_arguments``, in bf16 on a CPU too: transformers takes it only if told that the CPU is meant."""
    devices = {"use_cpu": not torch.cuda.is_available(), "bf16": bf16}
    return dataclasses.replace(training_arguments(settings), **devices)


def where(device: torch.device) -> dict[str, Any]:
    """Device and versions of a run, as a record keeps them."""
    found = {name: version for name, version in versions().items() if name != "platform"}
    return {"device": device_name(device), "versions": found}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN where one value has none."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error
