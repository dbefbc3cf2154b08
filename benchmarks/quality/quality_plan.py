"""What the quality benchmark runs: suites, methods, learning rates, seeds, ablations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ept.training.options import ABLATIONS as ALL_ABLATIONS
from ept.training.options import SYSTEMS, System

if TYPE_CHECKING:
    from quality_run import RunLog

#: N LoRAs, each in a model that sees its own task alone: of rank 8, and of the rank at which all of them have at most
#: EPT's parameters. What users have today who fine-tune for many tasks.
SEPARATE = ("lora-per-task", "lora-per-task-small")

#: Every method, in the order of the report.
METHODS = ("lora", *SEPARATE, "moelora", "more", "mixlora", "dcft", "tucka", "ept")

#: The paper's ablations but "mixed", which is the method itself and runs anyway.
ABLATIONS = tuple(name for name in ALL_ABLATIONS if name != "mixed")


@dataclass(frozen=True)
class Suite:
    """Tasks and the model that learns them. ``data`` None: the caller's folder; ``tasks`` None: all."""

    model: str
    tasks: tuple[str, ...] | None
    data: str | None = None


SUITES = {
    "glue": Suite("minilm", ("cola", "mrpc", "rte", "stsb", "sst2", "mnli")),
    "commonsense": Suite("smollm2", ("boolq", "openbookqa", "arc_e", "arc_c")),
    "embedded": Suite("minilm", None, data="sentiment"),
}


@dataclass(frozen=True)
class Bench:
    """What all runs of a benchmark share.

    ``rates``: the grid, as multiples of a method's default learning rate; ``widen``: where its largest rate is the
    best, twice that rate is tried, too. ``rate``: the learning rate of every run instead, none is chosen.
    ``curve_steps``: score a final run after every so many of its steps, too; None: at its end.
    """

    suite: str
    data: str
    tasks: tuple[str, ...] | None
    model: str
    methods: tuple[str, ...]
    ablations: tuple[str, ...]
    steps: int
    selection_steps: int
    seeds: int
    rates: tuple[float, ...]
    widen: bool
    batch_size: int
    max_length: int
    bf16: bool
    eval_limit: int | None
    rate: float | None = None
    curve_steps: int | None = None


@dataclass(frozen=True)
class Run:
    """One training run. ``phase``: "select" (scored on held-out training rows) or "final" (on the validation split)."""

    phase: str
    method: str
    lr: float
    seed: int
    steps: int
    ablation: str | None = None

    @property
    def title(self) -> str:
        what = self.method if self.ablation is None else f"{self.method}, {self.ablation}"
        return f"{what}: " + (f"rate {self.lr:g}" if self.phase == "select" else f"seed {self.seed}")


def candidates(bench: Bench, method: str, log: RunLog) -> list[Run]:
    """The runs that choose a method's learning rate: the grid, and what its finished runs add to it."""
    if bench.rate is not None:
        return []
    runs = [_candidate(bench, method, factor) for factor in bench.rates]
    if bench.widen and all(run in log for run in runs) and _best(runs, log) == runs[-1]:
        runs.append(_candidate(bench, method, 2 * bench.rates[-1]))
    return runs


def best_rate(bench: Bench, method: str, log: RunLog) -> float:
    """The rate whose run scored best on the held-out rows, the lower one of equals; or the rate of all runs."""
    return bench.rate if bench.rate is not None else _best(candidates(bench, method, log), log).lr


def system_of(method: str) -> System:
    """What trains a method: separate LoRAs are LoRA."""
    return SYSTEMS["lora" if method in SEPARATE else method]


def _candidate(bench: Bench, method: str, factor: float) -> Run:
    return Run("select", method, factor * system_of(method).learning_rate, 0, bench.selection_steps)


def _best(runs: list[Run], log: RunLog) -> Run:
    return max(runs, key=lambda run: (log[run]["mean"], -run.lr))


def finals(bench: Bench, rates: Mapping[str, float], seed: int) -> list[Run]:
    """The runs that are reported, of one seed: every method, and EPT's ablations where they are asked for."""
    runs = [Run("final", method, rates[method], seed, bench.steps) for method in bench.methods]
    if "ept" in rates:
        runs += [Run("final", "ept", rates["ept"], seed, bench.steps, ablation) for ablation in bench.ablations]
    return runs
