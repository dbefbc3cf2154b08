"""One run of the quality benchmark, and the log that makes a benchmark resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_plan import SEPARATE, Bench, Run, system_of
from training_run import arguments, where
from transformers import EvalPrediction, TrainerCallback

import ept
from ept.data import TaskData
from ept.plots import gate_shares
from ept.training import EPTTrainer
from ept.training.evaluate import baselines, evaluate_tasks
from ept.training.multitask import trained_parameters
from ept.training.options import SYSTEMS, RunSettings
from ept.training.run import make_adapted

Record = dict[str, Any]

#: Share of a task's training rows, and number of them at most, that choose a learning rate.
HELD_OUT_SHARE, HELD_OUT_ROWS = 0.1, 1000


def hold_out(task: TaskData) -> TaskData:
    """The task with a part of its training rows in place of its validation split; the same part every time."""
    rows = min(HELD_OUT_ROWS, max(1, int(HELD_OUT_SHARE * len(task.train))))
    parts = task.train.train_test_split(test_size=rows, seed=0)
    return dataclasses.replace(task, train=parts["train"], validation=parts["test"], test=None)


class _ScoredTrainer(EPTTrainer):
    """Keeps what the newest evaluation predicted, and scores the model on the way."""

    def __init__(self, *args: Any, curve_steps: int | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.curve: dict[int, dict[str, float]] = {}
        if curve_steps is not None:
            self.add_callback(_Curve(self, curve_steps))

    def headlines(self) -> dict[str, float]:
        """Every task's headline metric now."""
        found = self.evaluate_by_task()
        return {name: found[name][spec.metrics[0]] for name, spec in self._specs.items()}

    def _task_metrics(self, results: EvalPrediction) -> dict[str, float]:
        found: Any = results.predictions
        self.answers[self._evaluated.name] = (found if self._generates else found[0], results.label_ids)
        return super()._task_metrics(results)


class _Curve(TrainerCallback):
    """Scores after every so many steps; the random numbers of training stay what they are without it."""

    def __init__(self, trainer: _ScoredTrainer, steps: int) -> None:
        self._trainer, self._steps = trainer, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._steps == 0 and state.global_step < state.max_steps:
            with torch.random.fork_rng(devices=[]):
                self._trainer.curve[state.global_step] = self._trainer.headlines()


@dataclasses.dataclass
class _Trained:
    """One trained model, or the sum of several that learned a task each."""

    scores: dict[str, float]
    test: dict[str, float]
    curve: dict[int, dict[str, float]]
    answers: dict[str, tuple[np.ndarray, np.ndarray]]
    parameters: dict[str, int]
    device: torch.device
    expert_use: dict[str, dict[str, float]] | None = None


def execute(run: Run, bench: Bench, tasks: list[TaskData]) -> Record:
    """Train and score."""
    started = time.perf_counter()
    if run.method in SEPARATE:
        rank = _small_rank(run, bench, tasks) if run.method == "lora-per-task-small" else None
        trained = _joined([_train(run, bench, [task], share=len(tasks), rank=rank) for task in tasks], len(tasks))
    else:
        trained = _train(run, bench, tasks)
    specs = [task.spec for task in tasks]
    constant = baselines(tasks, bench.eval_limit)
    return {
        "scores": trained.scores,
        "metrics": {spec.name: spec.metrics[0] for spec in specs},
        "test": trained.test,
        "baseline": {spec.name: constant[spec.name][spec.metrics[0]] for spec in specs},
        "mean": float(np.mean(list(trained.scores.values()))),
        "curve": {str(step): scores for step, scores in trained.curve.items()},
        "answers": {name: _packed(*found) for name, found in trained.answers.items()} if run.phase == "final" else {},
        "rows": {task.spec.name: [len(task.train), len(task.validation)] for task in tasks},
        "parameters": trained.parameters,
        "expert_use": trained.expert_use,
        "seconds": round(time.perf_counter() - started, 1),
        **where(trained.device),
    }


def _settings(run: Run, bench: Bench, folder: str, *, share: int = 1, rank: int | None = None) -> RunSettings:
    return RunSettings(
        output=folder,
        model=bench.model,
        method=system_of(run.method).name,
        ablation=run.ablation,
        lr=run.lr,
        seed=run.seed,
        max_steps=max(1, run.steps // share),
        batch_size=bench.batch_size,
        max_length=bench.max_length,
        save_steps=0,
        eval_limit=bench.eval_limit,
        quiet=True,
        **({} if rank is None else {"r": rank, "alpha": 4.0 * rank}),
    )


def _train(run: Run, bench: Bench, tasks: Sequence[TaskData], *, share: int = 1, rank: int | None = None) -> _Trained:
    """One model on ``tasks``, for the part of the run's steps that is one of ``share`` equal parts."""
    specs = [task.spec for task in tasks]
    curve = bench.curve_steps if run.phase == "final" else None
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(run, bench, folder, share=share, rank=rank)
        model, tokenizer = make_adapted(settings, tasks)
        trainer = _ScoredTrainer(
            model,
            arguments(settings, bf16=bench.bf16),
            tasks=tasks,
            processing_class=tokenizer,
            curve_steps=None if curve is None else max(1, curve // share),
        )
        trainer.train()
        scores = trainer.headlines()
        tested = [dataclasses.replace(task, validation=task.test) for task in tasks if task.test is not None]
        scored = {"max_length": bench.max_length, "limit": bench.eval_limit}
        tests = evaluate_tasks(model, tokenizer, tested, **scored) if tested else {}
    return _Trained(
        scores={spec.name: scores[spec.name] for spec in specs},
        test={task.spec.name: tests[task.spec.name][task.spec.metrics[0]] for task in tested},
        curve=trainer.curve,
        answers=trainer.answers,
        parameters=trained_parameters(model),
        device=trainer.args.device,
        expert_use=expert_use(model) if run.method == "ept" else None,
    )


def _joined(parts: Sequence[_Trained], share: int) -> _Trained:
    """Models that learned a task each, as one result; a step of the curve is that of all of them together."""
    first, *others = parts
    for part in others:
        first.scores.update(part.scores)
        first.test.update(part.test)
        first.answers.update(part.answers)
        for step, scores in part.curve.items():
            first.curve[step].update(scores)
        for name, count in part.parameters.items():
            first.parameters[name] += count
    first.curve = {step * share: scores for step, scores in first.curve.items()}
    return first


def _small_rank(run: Run, bench: Bench, tasks: Sequence[TaskData]) -> int:
    """The largest rank at which a LoRA a task has no more parameters than one EPT, at least 1."""

    def size(method: str) -> int:
        settings = _settings(dataclasses.replace(run, method=method), bench, "unused")
        model, _ = make_adapted(settings, tasks)
        return sum(count for name, count in trained_parameters(model).items() if name != "other")

    rank: Any = SYSTEMS["lora"].default("r")
    return max(1, size("ept") * rank // (len(tasks) * size("lora")))


def _packed(predictions: np.ndarray, labels: np.ndarray) -> list[list[float]]:
    """``[predictions, labels]`` in few characters: classes as integers, numbers to three places; NaN as -1."""
    filled = np.nan_to_num(predictions.astype(np.float64), nan=-1.0)
    return [[int(v) if v == int(v) else round(v, 3) for v in values.tolist()] for values in (filled, labels)]


@torch.no_grad()
def expert_use(model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Mean weight over the layers that each task gives to the experts of each scale."""
    sizes = {layer: adapter.expert_labels for layer, adapter in ept.adapters(model).items()}
    shares = np.mean(list(gate_shares(ept.routing(model), sizes).values()), axis=0)
    scales = [str(k) for k in sorted({size for own in sizes.values() for size in own})]
    rows = zip(ept.task_names(model), shares.tolist(), strict=True)
    return {name: dict(zip(scales, row, strict=True)) for name, row in rows}


class RunLog:
    """The finished runs of one benchmark, in a file that grows by a line a run.

    A line that a crash cut short is no run. Runs under other shared settings, or of other data, may be in the file;
    they are not these.

    Args:
        data: the ``digest`` of the tasks; None, to read alone: the data of the last run under these settings.
    """

    def __init__(self, path: Path, bench: Bench, data: str | None = None) -> None:
        self._path, self._bench = path, _shared(bench)
        entries = list(_entries(path)) if path.exists() else []
        if data is None:
            last = (entry["bench"].get("data") for entry in reversed(entries) if _alike(entry["bench"], self._bench))
            data = next(last, None)
        self._bench["data"] = data
        self._records = {_key(entry["run"]): entry["record"] for entry in entries if entry["bench"] == self._bench}

    def __contains__(self, run: Run) -> bool:
        return _key(dataclasses.asdict(run)) in self._records

    def __getitem__(self, run: Run) -> Record:
        return self._records[_key(dataclasses.asdict(run))]

    def add(self, run: Run, record: Record) -> None:
        """Keep a finished run, on the disk before anything else happens."""
        entry = {"bench": self._bench, "run": dataclasses.asdict(run), "record": record}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size
        with self._path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[_key(entry["run"])] = record


def digest(tasks: Sequence[TaskData]) -> str:
    """Tells tasks with the same rows in the same order from any others."""
    found = hashlib.sha256()
    for task in tasks:
        found.update(json.dumps(dataclasses.asdict(task.spec)).encode())
        for split in (task.train, task.validation, task.test):
            found.update(b"split")
            for row in split or ():
                found.update(json.dumps(row, sort_keys=True).encode())
    return found.hexdigest()[:16]


def _entries(path: Path) -> Iterator[Record]:
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def _alike(found: Record, wanted: Record) -> bool:
    """Whether the settings of runs are the same, whatever their data."""
    return {**found, "data": None} == {**wanted, "data": None}


def _shared(bench: Bench) -> Record:
    """What decides a run's result, beside the run and its data: not where that lies, nor which runs there are."""
    kept = dataclasses.asdict(bench)
    for name in (
        "data",
        "methods",
        "ablations",
        "steps",
        "selection_steps",
        "seeds",
        "rates",
        "widen",
        "rate",
        "curve_steps",
    ):
        del kept[name]
    return json.loads(json.dumps(kept))


def _key(run: Record) -> str:
    return json.dumps(run, sort_keys=True)
