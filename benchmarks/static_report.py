"""Static check of the Triton kernels: compile every shipped configuration for every target, without a GPU.

    python benchmarks/static_report.py                               everything; hours on a core, see --jobs
    python benchmarks/static_report.py --cover configurations        each kernel with each of its tiles once
    python benchmarks/static_report.py --target sm_90 --dtype bf16 --kernel linear_kernel
    python benchmarks/static_report.py --sample 40 --seed 1          a random subset, the same for the same seed
    python benchmarks/static_report.py --output static.csv           one row for each compiled kernel (.md: the table)
    python benchmarks/static_report.py --output static.csv --resume  go on: only what the file does not hold yet

Calls of the ops on meta tensors, over the pyramids, layers and batches of ``static_cases.py``, say which kernels are
launched with which specialisation; each distinct one is compiled with each of its candidate tiles. The table shows, for
every kernel, tiles, target and dtype, the worst over the variants. Exits with 1 if one breaks a rule
(``static_rules.py``). Occupancy is the resident share of a processor's warps that registers and shared memory allow.

Launches are compiled in the order of ``--cover``, so that a run that is cut off has covered as much as it could: first
one of each configuration (a kernel, its tiles, a target, a dtype), then one of each variant and of each pyramid in it,
then what differs by sizes alone.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import static_csv
from rich.console import Console
from rich.progress import track
from rich.table import Table
from static_cases import CASES, DTYPES, calls
from static_compile import Compiled, compiled
from static_csv import tiles
from static_record import Launch, record
from static_rules import EXPECTATIONS, violations
from static_targets import TARGETS

HEADINGS = ("kernel", "tiles", "target", "dtype", "compiled", "registers", "stack", "shared", "occupancy")
#: How much to compile, each with all before it.
COVERS = ("configurations", "variants", "all")
COUNTS = ("matrix instructions", "asynchronous", "16-byte", "loads", "local", "wrong")


def shipped(targets: Iterable[str], dtypes: Iterable[str]) -> list[Launch]:
    """Every launch to compile, in a fixed order."""
    launches = []
    for target in targets:
        for dtype in dtypes:
            work = {call: start for case in CASES for call, start in calls(case, dtype).items()}
            launches += record(TARGETS[target], dtype, work)
    return launches


def by_coverage(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """The launches by the first of ``COVERS`` that asks for them, each part in its order.

    A launch stands for its configuration if it is the first of it; for its variant, or its pyramid, if it is the first
    with that in its configuration.
    """
    parts: dict[str, list[Launch]] = {cover: [] for cover in COVERS}
    seen: set[tuple[object, ...]] = set()
    for launch in launches:
        configuration = (launch.kernel, launch.config, launch.target, launch.dtype)
        variant, pyramid = (*configuration, launch.variant), (*configuration, launch.call.pyramid, "pyramid")
        if configuration not in seen:
            cover = "configurations"
        else:
            cover = "all" if variant in seen and pyramid in seen else "variants"
        parts[cover].append(launch)
        seen |= {configuration, variant, pyramid}
    return parts


def compile_all(launches: Sequence[Launch], jobs: int) -> Iterator[Compiled]:
    """Compile in ``jobs`` processes, in order."""
    if jobs == 1:
        yield from map(compiled, launches)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compiled, launches, chunksize=4)


def summary(results: Sequence[Compiled]) -> list[tuple[str, ...]]:
    """A row for each kernel, tiles, target and dtype: the worst over its variants."""
    groups = defaultdict(list)
    for result in results:
        launch = result.launch
        groups[launch.kernel, tiles(launch), launch.target, launch.dtype].append(result)
    rows = []
    for key, members in sorted(groups.items()):
        codes = [member.code for member in members if member.code is not None]
        wrong = sum(bool(violations(member)) for member in members)
        row = [*key, f"{len(members)}"]
        if not codes:
            rows.append((*row, *[""] * (len(HEADINGS) + len(COUNTS) - len(row) - 1), f"{wrong}"))
            continue
        matrix = Counter()
        for code in codes:
            matrix |= Counter(code.matrix)
        occupancies = [member.occupancy for member in members if member.code is not None]
        row += [
            _range(code.registers for code in codes),
            f"{max(code.stack for code in codes)}",
            _range(code.shared for code in codes),
            f"{min(occupancies):.0%}",
            ", ".join(f"{count} {name}" for name, count in matrix.items()) or "none",
            _range(code.asynchronous for code in codes),
            _range(code.wide_loads for code in codes),
            _range(code.loads for code in codes),
            f"{max(code.local for code in codes)}",
            f"{wrong}",
        ]
        rows.append(tuple(row))
    return rows


def _range(values: Iterable[int]) -> str:
    values = list(values)
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def table_file(path: Path, results: Sequence[Compiled]) -> None:
    """The table as markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [HEADINGS + COUNTS, ["---"] * len(HEADINGS + COUNTS), *summary(results)]
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compile every shipped Triton configuration without a GPU and check the machine code."
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only rows of this dtype (repeatable)")
    parser.add_argument("--kernel", action="append", choices=list(EXPECTATIONS), help="only this kernel (repeatable)")
    parser.add_argument("--case", help="only launches whose call contains this text, such as 'T=8192' or 'default r=8'")
    parser.add_argument(
        "--cover",
        choices=COVERS,
        default="all",
        help="one launch of each configuration, or of each of its variants and pyramids too, or all (default)",
    )
    parser.add_argument("--sample", type=int, help="compile only as many, drawn at random (at least 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--output", type=Path, help="write every compiled kernel (.csv) or the table (.md) here")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what --output (.csv) holds already, compiled from this source"
    )
    given = parser.parse_args(words)
    if given.sample is not None and given.sample < 1:
        parser.error(f"--sample must be at least 1, got {given.sample}")
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    if given.output is not None and given.output.suffix not in (".csv", ".md"):
        parser.error(f"--output must end in .csv or .md, got {given.output}")
    if given.resume and (given.output is None or given.output.suffix != ".csv"):
        parser.error(f"--resume needs an --output that ends in .csv, got {given.output}")
    return given


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(words)
    console = Console(width=None if sys.stdout.isatty() else 240)
    launches = [
        launch
        for launch in shipped(given.target or TARGETS, given.dtype or DTYPES)
        if (given.kernel is None or launch.kernel in given.kernel)
        and (given.case is None or given.case in launch.call.name)
    ]
    parts = by_coverage(launches)
    launches = [launch for cover in COVERS[: COVERS.index(given.cover) + 1] for launch in parts[cover]]
    found = len(launches)
    if given.sample is not None and given.sample < found:
        launches = random.Random(given.seed).sample(launches, given.sample)
    if not launches:
        console.print("no launch matches the filters")
        return 2
    rows = given.output if given.output is not None and given.output.suffix == ".csv" else None
    known = static_csv.read(rows) if given.resume else {}
    if rows is not None and not (given.resume and rows.exists()):
        static_csv.start(rows)
    keys = {launch: static_csv.key(launch) for launch in launches} if known else {}
    results = [static_csv.restored(launch, known[keys[launch]]) for launch in launches if keys.get(launch) in known]
    waiting = [launch for launch in launches if keys.get(launch) not in known]
    held = f", {len(results)} known already" if given.resume else ""
    console.print(f"{found} distinct kernels, compiling {len(waiting)}{held}")
    progress = Console(stderr=True)
    compiling = compile_all(waiting, given.jobs)
    for result in track(compiling, "compiling", total=len(waiting), console=progress, transient=True):
        results.append(result)
        if rows is not None:
            static_csv.append(rows, static_csv.row(result, violations(result)))

    table = Table(*HEADINGS, *COUNTS)
    for row in summary(results):
        table.add_row(*row)
    console.print(table)
    if given.output is not None and rows is None:
        table_file(given.output, results)
    wrong = [(result.launch, line) for result in results for line in violations(result)]
    for launch, line in wrong:
        where = f"{launch.kernel} ({launch.variant}) {tiles(launch)} for {launch.target} {launch.dtype}"
        console.print(f"[red]violation[/red] {where}: {line}  [dim][{launch.call.name}][/dim]")
    console.print(f"{len(results)} kernels compiled, {len(wrong)} violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
