"""What a run found: a table to read and a JSON file to keep."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ept.data import TaskSpec
from ept.files import write_json
from ept.training.evaluate import UNPARSEABLE, mean_headline

METRICS_FORMAT = 1
RESULT_STAGES = ("baseline", "before", "after")
_PACKAGES = ("ept-kernels", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")

Results = Mapping[str, Mapping[str, float]]  # {task: {metric: value}}


def results_table(specs: Sequence[TaskSpec], before: Results, after: Results, baseline: Results) -> Table:
    """A rich table, one line per task and metric, with the mean of the headline metrics last.

    ``gain`` is the headline metric after training minus its baseline, what knowing only the labels would score.
    """
    table = Table(box=box.SIMPLE_HEAD, caption="baseline: best constant answer; gain: after - baseline")
    for name in ("task", "metric"):
        table.add_column(name, justify="left")
    for name in ("baseline", "before", "after", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for spec in specs:
        for place, metric in enumerate(spec.metrics):
            row = [results[spec.name][metric] for results in (baseline, before, after)]
            table.add_row(spec.name if place == 0 else "", metric, *_numbers(row), style=None if place == 0 else "dim")
        if UNPARSEABLE in after[spec.name]:
            counts = [str(results[spec.name][UNPARSEABLE]) for results in (before, after)]
            table.add_row("", "unparseable answers", "", *counts, "", style="dim")
    table.add_section()
    means = [mean_headline(specs, results) for results in (baseline, before, after)]
    table.add_row("mean", "first metric of each", *_numbers(means), style="bold")
    return table


def _numbers(row: Sequence[float]) -> list[str]:
    baseline, _, after = row
    return [*(f"{value:.3f}" for value in row), f"{after - baseline:+.3f}"]


def versions() -> dict[str, str]:
    """Python, platform and the versions of the packages that decide a run's numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_metrics(
    path: str | Path,
    specs: Sequence[TaskSpec],
    *,
    before: Results,
    after: Results,
    baseline: Results,
    settings: Mapping[str, Any],
    device: str,
    parameters: Mapping[str, int],
    history: Sequence[Mapping[str, float]],
) -> Path:
    """Write a run's metrics as JSON: format, settings, versions, device, parameters, tasks, mean, history.

    ``tasks`` holds for every task its kind, headline metric and ``baseline``, ``before`` and ``after``, each
    ``{metric: value}``; ``mean`` the mean headline metric of the three; ``history`` the trainer's log.
    """
    stages = dict(zip(RESULT_STAGES, (baseline, before, after), strict=True))
    tasks = {
        spec.name: {
            "kind": spec.kind,
            "headline": spec.metrics[0],
            **{stage: dict(results[spec.name]) for stage, results in stages.items()},
        }
        for spec in specs
    }
    content = {
        "format": METRICS_FORMAT,
        "settings": dict(settings),
        "versions": versions(),
        "device": device,
        "parameters": dict(parameters),
        "tasks": tasks,
        "mean": {stage: mean_headline(specs, results) for stage, results in stages.items()},
        "history": [dict(entry) for entry in history],
    }
    return write_json(path, content)
