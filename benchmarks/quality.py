"""Every method on one bench: same model, data, order, schedule and number of steps; its own learning rate.

    python benchmarks/quality.py --data FOLDER                      # GLUE tasks of the folder, MiniLM
    python benchmarks/quality.py --suite commonsense --data FOLDER  # BoolQ, OBQA, ARC-E, ARC-C with SmolLM2
    python benchmarks/quality.py --suite embedded                   # the data that comes with the package
    python benchmarks/quality.py --suite embedded --quick           # does it run at all? five minutes, no result

First each method's learning rate is chosen from a small grid around its default, on a tenth of the training rows that
is held out and scored instead of the validation split; where the grid's largest rate is the best, twice that is tried,
too. Then it trains on all training rows with that rate, once a seed,
and is scored on the validation split; with ``--curve-steps`` along the way, too. ``--ablations`` adds EPT's variants at
EPT's rate. A run is one line of
``runs.jsonl`` in ``--output``, written when it is done; what is there already is not run again, so a killed benchmark
goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "quality"))

from quality_plan import ABLATIONS, METHODS, SUITES, Bench, Run, best_rate, candidates, finals
from quality_report import write_report
from quality_run import RunLog, digest, execute, hold_out
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ept.data import DataError, TaskData, load_tasks
from ept.training.report import quieten_libraries


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Quality of every method at equal steps.")
    parser.add_argument("--suite", choices=SUITES, default="glue")
    parser.add_argument("--data", help="folder with an index.json (glue and commonsense), or hub:ID")
    parser.add_argument("--tasks", help="names, separated by commas (default: the suite's)")
    parser.add_argument("--model", help="default: the suite's")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    text = "the paper's ablations of EPT, too: names, separated by commas, or no word for all"
    parser.add_argument("--ablations", nargs="?", const=",".join(ABLATIONS), help=text)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--selection-steps", type=int, help="of the runs that choose a rate (default: --steps)")
    parser.add_argument("--rate", type=float, help="learning rate of every run; none is chosen")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--curve-steps", type=int, help="score final runs after every so many steps, too")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16, all methods alike")
    parser.add_argument("--eval-limit", type=int, help="score this many rows a task at most")
    parser.add_argument("--quick", action="store_true", help="two rates, one seed, a few steps: a smoke test")
    parser.add_argument("--report-only", action="store_true", help="write the report of the runs that are there")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    return parser


def bench_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Bench:
    """The settings that all runs share; exits with a named error if one is bad."""
    suite = SUITES[options.suite]
    if suite.data is None and options.data is None:
        parser.error(f"argument --data is missing: the suite {options.suite!r} has no data of its own")
    methods = tuple(options.methods.split(","))
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(f"argument --methods: unknown {', '.join(unknown)}; allowed: {', '.join(METHODS)}")
    ablations = tuple(options.ablations.split(",")) if options.ablations else ()
    unknown = [name for name in ablations if name not in ABLATIONS]
    if unknown:
        parser.error(f"argument --ablations: unknown {', '.join(unknown)}; allowed: {', '.join(ABLATIONS)}")
    for name in ("steps", "selection_steps", "seeds", "batch_size", "max_length", "eval_limit", "curve_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
    if options.rate is not None and not 0 < options.rate < math.inf:
        parser.error(f"argument --rate: must be a positive number, got {options.rate}")
    quick = options.quick
    return Bench(
        suite=options.suite,
        data=options.data or suite.data,
        tasks=tuple(options.tasks.split(",")) if options.tasks else suite.tasks,
        model=options.model or suite.model,
        methods=methods,
        ablations=ablations,
        steps=6 if quick else options.steps,
        selection_steps=3 if quick else options.selection_steps or options.steps,
        seeds=1 if quick else options.seeds,
        rates=(1.0, 2.0) if quick else (0.5, 1.0, 2.0),
        widen=not quick,
        batch_size=options.batch_size,
        max_length=options.max_length,
        bf16=options.bf16,
        eval_limit=32 if quick else options.eval_limit,
        rate=options.rate,
        curve_steps=options.curve_steps,
    )


def run_all(bench: Bench, tasks: list[TaskData], log: RunLog, console: Console) -> None:
    """All runs that ``log`` lacks, in an order in which every prefix is useful: method by method, seed by seed."""
    held_out = [hold_out(task) for task in tasks]
    choosing = 0 if bench.rate is not None else len(bench.rates) + bench.widen
    planned = len(bench.methods) * (choosing + bench.seeds)
    planned += len(bench.ablations) * bench.seeds if "ept" in bench.methods else 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=planned)

        def do(run: Run) -> None:
            progress.update(bar, description=run.title)
            if run not in log:
                log.add(run, execute(run, bench, held_out if run.phase == "select" else tasks))
            progress.advance(bar)

        for method in bench.methods:
            for run in candidates(bench, method, log):
                do(run)
            wider = candidates(bench, method, log)[len(bench.rates) :]
            planned -= bool(choosing) and bench.widen and not wider
            progress.update(bar, total=planned)
            for run in wider:
                do(run)
        rates = {method: best_rate(bench, method, log) for method in bench.methods}
        for seed in range(bench.seeds):
            for run in finals(bench, rates, seed):
                do(run)


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    bench = bench_of(parser, options)
    quieten_libraries()
    console = Console()
    path = options.output / "runs.jsonl"
    if options.report_only:
        log = RunLog(path, bench)
    else:
        try:
            tasks = load_tasks(bench.data, bench.tasks)
        except DataError as error:
            parser.error(f"argument --data or --tasks: {error}")
        log = RunLog(path, bench, digest(tasks))
        run_all(bench, tasks, log, console)
    # The command that makes the runs, too; where the data lies on this machine is nobody else's business.
    words = ("FOLDER" if word == options.data else word for word in sys.argv[1:] if word != "--report-only")
    command = ["python benchmarks/quality.py", *words]
    for path in write_report(options.output, bench, log, " ".join(command)):
        console.print(str(path), soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
