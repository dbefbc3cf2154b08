"""Measure every candidate at one point: accuracy first, then time and memory of those that are right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from accuracy import Oracle, Verdict
from candidates import Candidate, build_candidate
from harness import Timed, alternate, forced_backend, load, ratio_spread, spread, timing_method
from memory import peak_bytes, peak_method, saved_bytes
from problem import RANK, Point, Problem, build
from torch import Tensor

PASSES = ("forward", "forward+backward")
BASELINE = "linear"

#: Columns of a row of results, in the order of the CSV file.
COLUMNS = (
    *("device", "device_type", "threads", "cpus", "python", "torch", "triton", "peft", "ept_kernels", "gpu_runtime"),
    *("commit", "triton_autotune"),
    *(
        "shape",
        "in_features",
        "out_features",
        "tokens",
        "samples",
        "tasks",
        "experts",
        "kernel_sizes",
        "top_k",
        "rank",
        "columns",
    ),
    *(
        "dtype",
        "pass",
        "candidate",
        "backend",
        "gpu_plan",
        "status",
        "note",
        "error",
        "error_limit",
        "worst_tensor",
        "rounds",
        "load",
    ),
    *("timing", "median_ms", "low_ms", "high_ms", "tokens_per_s", "ratio", "ratio_low", "ratio_high"),
    *("peak_bytes", "peak_method", "saved_bytes"),
)

#: status of a row: measured; refused, because its result is wrong; could not run.
OK, WRONG, FAILED = "ok", "wrong", "failed"

Row = dict[str, object]


@dataclass(frozen=True)
class Effort:
    """How long to measure a point: rounds at most, and seconds after which a pass starts no further round."""

    rounds: int
    budget: float


@dataclass(frozen=True)
class _Trial:
    """A candidate in one pass, before timing."""

    candidate: str
    backend: str
    verdict: Verdict | None = None
    note: str = ""


def _forward(candidate: Candidate, problem: Problem) -> Tensor:
    with torch.no_grad():
        return candidate.forward(problem.x)


def _forward_backward(candidate: Candidate, problem: Problem) -> tuple[Tensor | None, ...]:
    """Gradients of x and of everything trainable."""
    trainable = [tensor for tensors in candidate.leaves.values() for tensor in tensors]
    inputs = [problem.x, *trainable, *candidate.unchecked]
    return torch.autograd.grad(candidate.forward(problem.x), inputs, problem.cotangent, allow_unused=True)


#: A pass -> what calls a candidate.
CALLS: dict[str, Callable[[Candidate, Problem], object]] = {PASSES[0]: _forward, PASSES[1]: _forward_backward}


def _reason(error: Exception) -> str:
    """The first line that says something, without the class's module."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def _released(device: torch.device) -> Iterator[None]:
    """Return cached GPU memory afterwards, so that one candidate's appetite does not fail the next."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_point(
    point: Point,
    device: torch.device,
    names: Sequence[str],
    effort: Effort,
    provenance: Row,
    progress: Callable[[float, str], None] = lambda share, doing: None,
) -> list[Row]:
    """Rows of every candidate in ``names`` and the frozen linear, for both passes.

    A candidate whose output or a gradient is wrong gets a row without a time; so does one that raises, with the reason.

    Args:
        point: where to measure.
        device: on which device.
        names: candidates (``candidates.build_candidate``).
        effort: see there.
        provenance: columns that all rows share.
        progress: called with the share of this point done since the last call, and what is being done.

    Raises:
        RuntimeError: the frozen linear itself is wrong: nothing can be measured against it.
    """
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    problem = build(point, device)
    oracle = Oracle(problem)
    candidates: dict[str, Candidate] = {}
    trials: dict[str, list[_Trial]] = {which: [] for which in PASSES}
    for name in names:
        progress(0.0, f"checking {name}")
        with _released(device):
            _try(name, problem, oracle, candidates, trials)
        progress(0.3 / len(names), f"checked {name}")
    shared = {**provenance, **_describe(problem)}
    rows = []
    for which in PASSES:
        timed = [trial.candidate for trial in trials[which] if trial.verdict is not None and trial.verdict.right]
        if BASELINE not in timed:
            raise RuntimeError(f"the frozen linear is wrong or cannot run at {point}: {trials[which][0]}")
        rows += _timed_rows(which, problem, candidates, trials[which], timed, effort, shared, progress)
    return rows


def _try(
    name: str, problem: Problem, oracle: Oracle, candidates: dict[str, Candidate], trials: dict[str, list[_Trial]]
) -> None:
    """Build a candidate and judge both of its passes. Whatever it raises is a result, not the end of the run."""
    backend = [*name.split(":"), "torch"][1]
    for which in PASSES:
        try:
            candidate = candidates.get(name) or candidates.setdefault(name, build_candidate(name, problem))
            backend = candidate.backend
            with forced_backend(candidate.forced):
                verdict = oracle.judge(candidate, gradients=which != "forward")
            note = "" if verdict.right else f"error of {verdict.tensor} {verdict.error:.2e} > {verdict.limit:.2e}"
            trials[which].append(_Trial(name, backend, verdict, note))
        except Exception as error:
            trials[which].append(_Trial(name, backend, note=_reason(error)))


def _describe(problem: Problem) -> Row:
    point, geometry = problem.point, problem.layer.geometry
    return {
        "shape": point.shape,
        "in_features": geometry.in_features,
        "out_features": geometry.out_features,
        "tokens": point.tokens,
        "samples": len(problem.task_of_sample),
        "tasks": point.tasks,
        "experts": point.experts,
        "kernel_sizes": " ".join(map(str, geometry.kernel_sizes)),
        "top_k": problem.layer.top_k,
        "rank": RANK,
        "columns": _mean_columns(problem),
        "load": load(),
        "dtype": point.dtype,
    }


def _mean_columns(problem: Problem) -> float:
    """``r * sum(k)`` over the scales that a sample's task uses, mean of the samples."""
    sizes, tasks = problem.layer.geometry.kernel_sizes, problem.point.tasks
    index, _ = problem.layer.route(None if tasks == 1 else torch.arange(tasks, device=problem.device))
    by_task = [RANK * sum({sizes[expert] for expert in experts}) for experts in index.tolist()]
    return sum(by_task[task] for task in problem.task_of_sample) / len(problem.task_of_sample)


def _timed_rows(
    which: str,
    problem: Problem,
    candidates: dict[str, Candidate],
    trials: Sequence[_Trial],
    timed: Sequence[str],
    effort: Effort,
    shared: Row,
    progress: Callable[[float, str], None],
) -> list[Row]:
    device, done = problem.device, 0.0

    def advance(fraction: float) -> None:
        nonlocal done
        progress(0.35 * (fraction - done), f"timing {which}")
        done = fraction

    calls = {name: Timed(partial(CALLS[which], candidates[name], problem), candidates[name].forced) for name in timed}
    samples = alternate(calls, effort.rounds, device, budget=effort.budget, progress=advance)
    advance(1.0)
    rows = []
    for trial in trials:
        row: Row = dict.fromkeys(COLUMNS, "")
        row.update(shared, candidate=trial.candidate, backend=trial.backend, note=trial.note)
        row["pass"] = which
        row["gpu_plan"] = _gpu_plan(trial)
        row["status"] = FAILED if trial.verdict is None else OK if trial.verdict.right else WRONG
        if trial.verdict is not None:
            row.update(error=trial.verdict.error, error_limit=trial.verdict.limit, worst_tensor=trial.verdict.tensor)
        if trial.candidate in calls:
            row.update(_timing(samples[trial.candidate], samples[BASELINE], problem))
            row.update(_memory(which, candidates[trial.candidate], problem, calls[trial.candidate]))
        rows.append(row)
    return rows


def _gpu_plan(trial: _Trial) -> str:
    """The plan that the candidate or ``EPT_GPU_PLAN`` forces, or "automatic"; "none" where a backend has no plans."""
    if trial.backend != "triton":
        return "none"
    plan = trial.candidate.split(":")[2:]
    return plan[0] if plan else os.environ.get("EPT_GPU_PLAN") or "automatic"


def _timing(samples: Sequence[float], baseline: Sequence[float], problem: Problem) -> Row:
    seconds, ratio = spread(samples), ratio_spread(samples, baseline)
    return {
        "rounds": len(samples),
        "timing": timing_method(problem.device),
        "median_ms": seconds.median * 1e3,
        "low_ms": seconds.low * 1e3,
        "high_ms": seconds.high * 1e3,
        "tokens_per_s": problem.point.tokens / seconds.median,
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }


def _memory(which: str, candidate: Candidate, problem: Problem, timed: Timed) -> Row:
    with forced_backend(candidate.forced), _released(problem.device):
        found: Row = {"peak_bytes": peak_bytes(timed.call, problem.device), "peak_method": peak_method(problem.device)}
        if which != "forward":
            leaves = [tensor for tensors in candidate.leaves.values() for tensor in tensors]
            parameters = [*problem.layer.parameters(), *leaves]  # the layer's base weight is everybody's
            found["saved_bytes"] = saved_bytes(lambda: candidate.forward(problem.x), parameters)
    return found
