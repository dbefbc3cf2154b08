"""How fast is an EPT layer, beside its frozen linear and the alternatives? Side by side in one process.

    python benchmarks/throughput.py --quick                       # under two minutes on 2 CPU cores
    python benchmarks/throughput.py                               # every axis
    python benchmarks/throughput.py --shapes llama2-7b --tokens 2048,8192 --dtype bf16 --output runs/llama
    python benchmarks/throughput.py --plot runs/throughput/throughput.csv

Each axis (shapes, tokens, tasks in the batch, experts, dtype) takes a list. The first values together are the centre;
the others are measured one axis at a time around it, or in all combinations with ``--cross``. Candidates:
``candidates.py``. Points and tensors: ``problem.py``. Accuracy comes before time: a candidate whose output or gradient
fails the rule of ``accuracy.py`` gets no time, no ratio and a line that says so. Timing: ``harness.py``. Memory:
``memory.py``.

*forward* is inference (``no_grad``). *forward+backward* also computes the gradients of x, of the adapter and of its
router (for the frozen linear that of x alone).

Writes ``throughput.csv`` (one row for each candidate, pass and point, after each point), ``throughput.md`` and plots.
Exit status: 0; 1 if an EPT backend was wrong or failed; 2 for a bad argument.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "speed"))

from candidates import BUILDERS, KINDS
from harness import device_name, load, pick_device, provenance
from measure import OK, Effort, Row, measure_point
from problem import DTYPES, Point, sample_count, shape_names
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from throughput_report import markdown, plots, read_rows, write_rows

import ept_kernels

NEVER_UNASKED = "reference"
#: How Triton may add the base product and the update.
TRITON_PLANS = ("library", "fused")
FILE = "throughput.csv"


@dataclass(frozen=True)
class Defaults:
    """What is measured where nothing is said."""

    shapes: str
    tokens: str
    tasks: str
    experts: str
    dtype: str
    rounds: int
    budget: float


QUICK = Defaults("t5-base.q", "512", "4", "8", "fp32", rounds=7, budget=8)
CPU = Defaults("t5-base,llama2-7b", "512,128,2048", "8,1,16", "8,4,16", "fp32", rounds=20, budget=20)
GPU = Defaults("llama2-7b,t5-base", "8192,512,2048,32768", "8,1,4,64", "8,4,16,32", "bf16", rounds=100, budget=30)


def _positive(name: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be integers >= 1 with commas between them, got {text!r}")
    return [int(part) for part in parts]


def _chosen(name: str, text: str, allowed: Sequence[str]) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in allowed]:
        raise ValueError(f"{name} must be out of {', '.join(allowed)}, got {', '.join(map(repr, unknown))}")
    return parts


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Throughput of an EPT layer beside its alternatives.")
    parser.add_argument("--quick", action="store_true", help="one small point, few rounds, without torch.compile")
    parser.add_argument("--shapes", help="t5-base.q, ..., t5-base, llama2-7b (all layers of a model), or INxOUT")
    parser.add_argument("--tokens", help="rows of x")
    parser.add_argument("--tasks", help="tasks in the batch")
    parser.add_argument("--experts", help="experts, spread evenly over the scales 2, 4, 6, 8")
    parser.add_argument("--dtype", help=", ".join(DTYPES))
    parser.add_argument(
        "--backends",
        help="EPT backends (triton:library, triton:fused: how its products are added); default: all that can serve, "
        "without reference, on a GPU with Triton's plans side by side",
    )
    parser.add_argument("--candidates", help=f"out of {', '.join(KINDS)}; default: all")
    parser.add_argument("--cross", action="store_true", help="all combinations instead of one axis at a time")
    parser.add_argument("--device", help="default: the GPU, else the CPU")
    parser.add_argument("--rounds", type=int, help="alternating rounds for each pass")
    parser.add_argument("--budget", type=float, help="seconds after which a pass starts no further round (3 at least)")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"), help="folder for CSV, table and plots")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw and print what an earlier run measured")
    return parser


def grid(axes: dict[str, Sequence], cross: bool) -> list[Point]:
    """Points of the axes, the centre first: one axis at a time around it, or all combinations.

    Raises:
        ValueError: a point with fewer tokens than tasks.
    """
    if cross:
        points = [Point(*values) for values in itertools.product(*axes.values())]
    else:
        centre = {name: values[0] for name, values in axes.items()}
        points = [Point(**{**centre, name: value}) for name, values in axes.items() for value in values]
    for point in points:
        sample_count(point.tokens, point.tasks)
    return list(dict.fromkeys(points))


def candidate_names(options: argparse.Namespace, device: torch.device, dtype: str) -> list[str]:
    """Keys of the candidates to measure in ``dtype``.

    Raises:
        ValueError: one that does not exist, or a backend that cannot serve there.
    """
    kinds = list(KINDS)
    if options.candidates is not None:
        kinds = _chosen("candidates", options.candidates, KINDS)
    elif options.quick:
        kinds.remove("compile")
    names = [kind for kind in BUILDERS if kind in kinds]
    if "ept" not in kinds:
        return names
    available = ept_kernels.available_backends(device, DTYPES[dtype])
    plans = [f"triton:{plan}" for plan in TRITON_PLANS]
    plans = plans if "triton" in available else []
    if options.backends is None:
        chosen = [backend for backend in available if backend != NEVER_UNASKED]
        return names + [f"ept:{backend}" for backend in chosen + (plans if device.type == "cuda" else [])]
    return names + [f"ept:{backend}" for backend in _chosen("backends", options.backends, [*available, *plans])]


def plan(options: argparse.Namespace, device: torch.device) -> tuple[list[tuple[Point, list[str]]], Effort]:
    """Every point with its candidates, and the effort.

    Raises:
        ValueError: an option out of its range, before anything is measured.
    """
    defaults = QUICK if options.quick else GPU if device.type == "cuda" else CPU
    said = {name: getattr(options, name) for name in ("shapes", "tokens", "tasks", "experts", "dtype")}
    text = {name: getattr(defaults, name) if value is None else value for name, value in said.items()}
    axes = {
        "shape": [name for part in text["shapes"].split(",") for name in shape_names(part)],
        **{name: _positive(name, text[name]) for name in ("tokens", "tasks", "experts")},
        "dtype": _chosen("dtype", text["dtype"], tuple(DTYPES)),
    }
    rounds = defaults.rounds if options.rounds is None else options.rounds
    budget = defaults.budget if options.budget is None else options.budget
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    points = grid(axes, options.cross)
    return [(point, candidate_names(options, device, point.dtype)) for point in points], Effort(rounds, budget)


def run(plans: Sequence[tuple[Point, list[str]]], effort: Effort, device: torch.device, path: Path) -> list[Row]:
    """Measure every point, with a progress bar; rows go to the CSV file as they come."""
    shared = provenance(device)
    rows: list[Row] = []
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(plans))
        for number, (point, names) in enumerate(plans, start=1):
            words = f"{number}/{len(plans)} {point.shape}, {point.tokens} tokens"

            def progress(share: float, doing: str, words: str = words) -> None:
                bar.update(task, advance=share, description=f"{words}: {doing}")

            found = measure_point(point, device, names, effort, shared, progress)
            write_rows(path, found)
            rows += found
            bar.update(task, completed=number)
    return rows


def announce(device: torch.device, console: Console) -> None:
    """Say what is measured on, and what that leaves out."""
    threads = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        console.print(f"Measuring on {device_name(device)}.", highlight=False)
    elif torch.cuda.is_available():
        console.print(f"Measuring on the CPU, as asked: {device_name(device)}, {threads}.", highlight=False)
    else:
        console.print(
            f"No GPU found: measuring on the CPU ({device_name(device)}, {threads}). "
            "These numbers say nothing about GPU kernels.",
            highlight=False,
        )
    if device.type == "cpu" and (busy := load()) and busy > (os.cpu_count() or 1):
        console.print(f"Load average {busy} on {os.cpu_count()} CPUs: others are at work, and the times will be noisy.")


def report(path: Path, folder: Path) -> None:
    """Write and print the table, draw the plots."""
    table = markdown(read_rows(path))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "throughput.md").write_text(table, encoding="utf-8")
    print(table)
    for file in plots(path, folder):
        print(file)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.plot is not None:
        try:
            report(options.plot, options.output)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    try:
        device = pick_device(options.device)
        plans, effort = plan(options, device)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    announce(device, Console(stderr=True))
    path = options.output / FILE
    path.unlink(missing_ok=True)
    rows = run(plans, effort, device, path)
    report(path, options.output)
    bad = [row for row in rows if str(row["candidate"]).startswith("ept:") and row["status"] != OK]
    for row in bad:
        where = f"{row['candidate']} at {row['shape']}, {row['tokens']} tokens, {row['dtype']}, {row['pass']}"
        print(f"{row['status']}: {where}: {row['note']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
