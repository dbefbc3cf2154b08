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
from quality_plan import Bench, Run
from training_run import arguments, where

import ept
from ept.data import TaskData
from ept.training import EPTTrainer
from ept.training.evaluate import baselines, evaluate_tasks, mean_headline
from ept.training.inspection import trained_parameters
from ept.training.options import RunSettings
from ept.training.plots import gate_shares
from ept.training.run import make_adapted

Record = dict[str, Any]

#: Share of a task's training rows, and number of them at most, that choose a learning rate.
HELD_OUT_SHARE, HELD_OUT_ROWS = 0.1, 1000


def hold_out(task: TaskData) -> TaskData:
    """The task with a part of its training rows in place of its validation split; the same part every time."""
    rows = min(HELD_OUT_ROWS, max(1, int(HELD_OUT_SHARE * len(task.train))))
    parts = task.train.train_test_split(test_size=rows, seed=0)
    return dataclasses.replace(task, train=parts["train"], validation=parts["test"], test=None)


def execute(run: Run, bench: Bench, tasks: list[TaskData]) -> Record:
    """Train and score."""
    specs = [task.spec for task in tasks]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = RunSettings(
            output=folder,
            model=bench.model,
            method=run.method,
            ablation=run.ablation,
            lr=run.lr,
            seed=run.seed,
            max_steps=run.steps,
            batch_size=bench.batch_size,
            max_length=bench.max_length,
            save_steps=0,
            eval_limit=bench.eval_limit,
            quiet=True,
        )
        model, tokenizer = make_adapted(settings, tasks)
        trainer = EPTTrainer(model, arguments(settings, bf16=bench.bf16), tasks=tasks, processing_class=tokenizer)
        trainer.train()
        scores = trainer.evaluate_by_task()
        tested = [dataclasses.replace(task, validation=task.test) for task in tasks if task.test is not None]
        scored = {"max_length": bench.max_length, "limit": bench.eval_limit}
        tests = evaluate_tasks(model, tokenizer, tested, **scored) if tested else {}
    constant = baselines(tasks, bench.eval_limit)
    return {
        "scores": {spec.name: scores[spec.name][spec.metrics[0]] for spec in specs},
        "metrics": {spec.name: spec.metrics[0] for spec in specs},
        "test": {task.spec.name: tests[task.spec.name][task.spec.metrics[0]] for task in tested},
        "baseline": {spec.name: constant[spec.name][spec.metrics[0]] for spec in specs},
        "mean": mean_headline(specs, scores),
        "rows": {task.spec.name: [len(task.train), len(task.validation)] for task in tasks},
        "parameters": trained_parameters(model),
        "expert_use": expert_use(model) if run.method == "ept" else None,
        "seconds": round(time.perf_counter() - started, 1),
        **where(trainer.args.device),
    }


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
    for name in ("data", "methods", "ablations", "steps", "selection_steps", "seeds", "rates", "widen", "rate"):
        del kept[name]
    return json.loads(json.dumps(kept))


def _key(run: Record) -> str:
    return json.dumps(run, sort_keys=True)
