"""What a run shows: a progress bar, a table to read and a JSON file to keep."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..data import TaskSpec
from ..files import write_json
from .evaluate import UNPARSEABLE, mean_headline

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


_SHOWN = ("loss", "learning_rate", "eval_mean")


class LossProgress(ProgressCallback):
    """transformers' bar, with the newest losses as its postfix, and one bar for the evaluation of all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self._loader: DataLoader | None = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        is_new = eval_dataloader is not self._loader
        if self.prediction_bar is not None and eval_dataloader is not None and is_new:
            self.prediction_bar.total += len(eval_dataloader)
        self._loader = eval_dataloader
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = {
            name: f"{value:.4g}"
            for name, value in (logs or {}).items()
            if name in _SHOWN or (name.endswith("_loss") and not name.startswith("eval"))
        }
        if shown and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix(shown)


def quieten_libraries() -> None:
    """Leave out what only a developer of the libraries wants to see: their loading bars and a deprecation in PEFT."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
