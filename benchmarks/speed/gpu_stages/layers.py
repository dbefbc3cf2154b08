"""A layer, forward and forward + backward, beside its frozen linear, PEFT's LoRA and a LoRA by hand; eager and graphed.

``EPTLinear`` with its router and fold, as users call it. A way whose output or gradients are further from the torch
backend's than half precision explains gets no time: ``gate`` says how it stands to float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from accuracy import Values, evaluate, relative_error
from candidates import Candidate, build_candidate
from harness import Timed, forced_backend
from measure import CALLS
from problem import Point, Problem, build

from .bench import Bench, environment
from .tensors import ways

#: (in, out, tokens, tasks), the most telling first.
POINTS = (
    (4096, 4096, 8192, 8),
    (4096, 11008, 8192, 8),
    (768, 768, 8192, 8),
    (4096, 4096, 16, 1),
    (4096, 4096, 8192, 1),
    (768, 768, 16, 1),
    (4096, 4096, 16, 8),
    (4096, 11008, 16, 1),
    (768, 768, 8192, 1),
    (4096, 11008, 8192, 1),
    (768, 768, 16, 8),
    (4096, 11008, 16, 8),
)
MOST_ERROR = 2e-2
#: Beside a way, the same without what forward keeps for the backward.
RECOMPUTED = "+recompute"


def run(bench: Bench) -> None:
    """As many points as there is time for; with little of it only what decides."""
    for width, height, tokens, tasks in POINTS[:1] if bench.dry else POINTS:
        width, height = bench.size(width, height)
        tokens = min(tokens, 64) if bench.dry else tokens
        labels = {"in": width, "out": height, "tokens": tokens, "tasks": tasks}
        if bench.left < 6:
            bench.emit(what="layer", **labels, skipped="no time left")
            continue
        with bench.attempt(what="layer", **labels):
            problem = build(Point(f"{width}x{height}", tokens, tasks, experts=8, dtype="bf16"), bench.device)
            _point(bench, problem, labels)


def _point(bench: Bench, problem: Problem, labels: dict[str, int]) -> None:
    candidates = {}
    for name in ("linear", "lora", "addmm", *(f"ept:{way}" for way in ways(bench.device, problem.dtype))):
        with bench.attempt(what="layer", way=name, **labels):
            candidates[name] = build_candidate(name, problem)
    exact = _values(candidates["ept:torch"], problem)
    for name in [name for name in candidates if name.startswith("ept:")]:
        with bench.attempt(what="layer", way=name, **labels):
            found = _values(candidates[name], problem)
            error = max(relative_error(found[tensor], exact[tensor]) for tensor in exact)
            if not error <= MOST_ERROR:
                bench.emit(what="layer", way=name, **labels, right=False, error=f"{error:.1e} from the torch backend")
                del candidates[name]
    for which in CALLS:
        calls = {}
        for name, candidate in candidates.items():
            call = partial(CALLS[which], candidate, problem)
            with bench.attempt(what="layer", way=name, **labels), forced_backend(candidate.forced):
                calls[f"{name} eager"] = Timed(call, candidate.forced)
                calls[f"{name} graph"] = Timed(bench.graphed(call))
                if which != "forward" and name.startswith("ept:") and problem.point.tokens > 64:
                    again = _recomputing(call)
                    calls[f"{name}{RECOMPUTED} graph"] = Timed(bench.graphed(again))
        for how in ("eager", "graph"):
            timed = {name.removesuffix(f" {how}"): call for name, call in calls.items() if name.endswith(how)}
            more = {"pass": which, "how": how, "dtype": problem.point.dtype}
            seconds = min(2.5, bench.left / 4)
            bench.compare(timed, key="way", baseline="linear", seconds=seconds, **labels, **more)


def _recomputing(call: Callable[[], object]) -> Callable[[], object]:
    def recomputing() -> object:
        with environment(EPT_RECOMPUTE="1"):
            return call()

    return recomputing


def _values(candidate: Candidate, problem: Problem) -> Values:
    """Output and gradients."""
    with forced_backend(candidate.forced):
        return evaluate(lambda x, _: candidate.forward(x), problem.x, candidate.leaves, problem.cotangent)
