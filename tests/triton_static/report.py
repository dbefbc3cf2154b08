"""Static check of the Triton kernels: compile what is shipped for every target, without a GPU, and judge the code.

    python tests/triton_static/report.py                        everything that the installed Triton would compile
    python tests/triton_static/report.py --target sm_90 --dtype bf16 --kernel fused_kernel
    python tests/triton_static/report.py --case default --each  one launch of each kernel, tiles and variant
    python tests/triton_static/report.py --output static.csv    one row for each compiled kernel

Calls on meta tensors (``cases.py``) say which kernels are launched with which specialisation; each distinct one
is compiled with each of its candidate tiles. Exits with 1 if one breaks a rule (``rules.py``). Another Triton
than the installed one is checked with its folder first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton
from cases import DTYPES, calls
from compiling import Compiled, compiled
from record import Launch, record
from rules import EXPECTATIONS, violations
from targets import TARGETS

COLUMNS = ("kernel", "registers", "shared", "matrix", "asynchronous", "wide", "loads", "local", "occupancy", "wrong")

#: What the processes that compile find: they are forked, since a launch holds what cannot be sent.
_launches: list[Launch] = []


def _compiled(number: int) -> tuple[str, ...]:
    return row(compiled(_launches[number]))


def row(result: Compiled) -> tuple[str, ...]:
    """A result by ``COLUMNS``."""
    code, wrong = result.code, "; ".join(violations(result))
    if code is None:
        return (result.launch.name, *[""] * (len(COLUMNS) - 2), wrong)
    matrix = ", ".join(f"{count} {name}" for name, count in code.matrix.items())
    counts = (code.registers, code.shared, matrix, code.asynchronous, code.wide_loads, code.loads, code.local)
    return (result.launch.name, *map(str, counts), f"{result.occupancy:.0%}", wrong)


def compile_all(launches: Sequence[Launch], jobs: int) -> Iterator[tuple[str, ...]]:
    """A row of each launch, in order, compiled in ``jobs`` processes."""
    _launches[:] = launches
    if jobs == 1:
        yield from map(_compiled, range(len(launches)))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        yield from pool.map(_compiled, range(len(launches)))


def selected(given: argparse.Namespace) -> list[Launch]:
    """The launches that the command's filters leave, in a fixed order."""
    launches = [
        launch
        for target in given.target or TARGETS
        for dtype in given.dtype or DTYPES
        for launch in record(TARGETS[target], dtype, calls(dtype))
        if (given.kernel is None or launch.kernel in given.kernel) and (given.case or "") in launch.call.name
    ]
    if given.each:
        first = {(each.kernel, each.config, each.variant, each.target, each.dtype): each for each in reversed(launches)}
        launches = [launch for launch in launches if launch in set(first.values())]
    return launches


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compile every shipped Triton configuration without a GPU and check the machine code."
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only rows of this dtype (repeatable)")
    parser.add_argument("--kernel", action="append", choices=list(EXPECTATIONS), help="only this kernel (repeatable)")
    parser.add_argument("--case", help="only launches whose call contains this text, such as 'T=8192' or 'rank 17'")
    parser.add_argument("--each", action="store_true", help="each kernel, tiles and variant once, whatever the sizes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--output", type=Path, help="write a row for each compiled kernel to this CSV file")
    given = parser.parse_args(words)
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    return given


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(words)
    launches = selected(given)
    if not launches:
        print("no launch matches the filters")
        return 2
    print(f"Triton {triton.__version__}, {len(launches)} kernels", flush=True)
    rows = []
    for number, line in enumerate(compile_all(launches, given.jobs), 1):
        rows.append(line)
        counts = ", ".join(f"{value} {name}" for name, value in zip(COLUMNS[1:-1], line[1:-1], strict=True) if value)
        print(f"{number}/{len(launches)} {line[0]}: {counts}", flush=True)
        if line[-1]:
            print(f"  VIOLATION: {line[-1]}", flush=True)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        with given.output.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    wrong = sum(bool(line[-1]) for line in rows)
    print(f"{len(rows)} kernels compiled, {wrong} with violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
