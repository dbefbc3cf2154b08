"""The time that an EPT layer cannot do without, beside its frozen linear and LoRA, on three accelerators.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --tokens 2048 --in-features 768 --out-features 3072 --device h100 --launches
    python benchmarks/roofline.py --json

Data-sheet rates: ``roofline_devices``. Every term: ``roofline_model``. A floor, not a prediction: no launch latency, no
cache too small, peak rates. The target is an overhead of at most 1.05 times the frozen linear's floor. The worst case
over the scales that a task's top-k experts can use is judged, and the average over all equally likely choices stated.

Exit status: 0 if on every device some fused design meets the target in each pass of ``--judge``, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from roofline_designs import DESIGNS, PASSES, Estimate, active_sets, estimate
from roofline_devices import ACCELERATORS, Accelerator
from roofline_model import ELEMENT_BYTES, PADDINGS, Launch, Work

from ept_kernels import PyramidGeometry

TARGET = 1.05
PYRAMID = (2, 2, 4, 4, 6, 6, 8, 8)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bytes, FLOPs and time floors of an EPT layer.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pyramid", type=_numbers, default=PYRAMID, help="kernel size of every expert")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--active", type=_numbers, help="distinct scales in use; default: the worst case of the top-k")
    parser.add_argument("--tasks", type=int, default=1, help="tasks in the batch")
    parser.add_argument("--dtype", choices=tuple(ELEMENT_BYTES), default="bf16")
    parser.add_argument("--padding", choices=PADDINGS, default="pow2", help="columns of the generated matrices")
    parser.add_argument("--row-block", type=int, default=64, help="rows of a program of the shrink kernel")
    parser.add_argument("--splits", type=int, default=16, help="parts of the rows for the gradients of A and B")
    parser.add_argument("--device", choices=tuple(ACCELERATORS), action="append", help="default: all")
    parser.add_argument("--judge", choices=PASSES, action="append", help="default: forward and total")
    parser.add_argument("--launches", action="store_true", help="also print every launch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    options.device = options.device or list(ACCELERATORS)
    options.judge = options.judge or ["forward", "total"]
    return options


def _work(options: argparse.Namespace, active: tuple[int, ...]) -> Work:
    geometry = PyramidGeometry(options.in_features, options.out_features, options.rank, options.pyramid)
    return Work(
        options.tokens,
        geometry,
        active,
        options.dtype,
        options.tasks,
        options.padding,
        options.row_block,
        options.splits,
    )


def verdicts(device: Accelerator, estimates: dict[str, Estimate], judged: Sequence[str]) -> list[tuple[bool, str]]:
    """For each judged pass: whether a fused design meets the target, and that in words, design by design."""
    lines = []
    for which in judged:
        ratios = {name: found.ratios[which] for name, found in estimates.items() if DESIGNS[name].fused}
        words = []
        for name, ratio in ratios.items():
            outcome = "meets it" if ratio <= TARGET else f"misses it by {ratio - TARGET:.3f}"
            words.append(f"{DESIGNS[name].title} {outcome} ({ratio:.3f})")
        lines.append((min(ratios.values()) <= TARGET, f"{device.name}, {which}, target {TARGET}: {'; '.join(words)}"))
    return lines


def _design_table(device: Accelerator, work: Work, estimates: dict[str, Estimate]) -> Table:
    table = Table(title=f"{device.name}, scales {work.active} in use", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("design")
    for which in ("forward", "backward"):
        for unit in ("launches", "MB", "GFLOP", "µs", "ratio"):
            table.add_column(f"{which}\n{unit}", justify="right")
    table.add_column("total\nratio", justify="right")
    for name, found in estimates.items():
        cells = [DESIGNS[name].title]
        for which, launches in (("forward", found.forward), ("backward", found.backward)):
            moved, flops = sum(launch.bytes for launch in launches), sum(launch.flops for launch in launches)
            cells += [str(len(launches)), f"{moved / 1e6:.1f}", f"{flops / 1e9:.1f}"]
            cells += [f"{found.seconds[which] * 1e6:.1f}", f"{found.ratios[which]:.3f}"]
        table.add_row(*cells, f"{found.ratios['total']:.3f}")
    return table


def _launch_table(device: Accelerator, dtype: str, estimates: dict[str, Estimate]) -> Table:
    table = Table(title=f"{device.name}, launch by launch", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("design", "pass", "launch", "reads (MB)", "writes (MB)"):
        table.add_column(name)
    for name in ("GFLOP", "µs", "limit"):
        table.add_column(name, justify="right")
    for name, found in estimates.items():
        for which, launches in (("forward", found.forward), ("backward", found.backward)):
            for launch in launches:
                floor = launch.floor(device, dtype)
                limit = "bytes" if launch.bytes / device.bandwidth >= launch.flops / device.rates[dtype] else "FLOPs"
                cells = [DESIGNS[name].title, which, launch.name, _listed(launch.reads), _listed(launch.writes)]
                table.add_row(*cells, f"{launch.flops / 1e9:.2f}", f"{floor * 1e6:.1f}", limit)
    return table


def _listed(tensors: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e6:.3g}" for name, size in tensors.items())


def _choices_table(device: Accelerator, choices: list[tuple[tuple[int, ...], float, dict[str, Estimate]]]) -> Table:
    shown = [(name, which) for name, design in DESIGNS.items() if design.fused for which in ("forward", "total")]
    table = Table(title=f"{device.name}, by the scales in use", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("scales")
    table.add_column("chance", justify="right")
    for name, which in shown:
        table.add_column(f"{DESIGNS[name].title}\n{which}", justify="right")
    for active, chance, estimates in choices:
        ratios = [f"{estimates[name].ratios[which]:.3f}" for name, which in shown]
        table.add_row(", ".join(map(str, active)), f"{chance:.1%}", *ratios)
    table.add_section()
    table.add_row("mean", "", *(f"{mean_ratio(choices, name, which):.3f}" for name, which in shown))
    return table


def mean_ratio(choices: Sequence[tuple[tuple[int, ...], float, dict[str, Estimate]]], name: str, which: str) -> float:
    """The ratio of a design averaged over all equally likely choices of experts."""
    return sum(chance * estimates[name].ratios[which] for _, chance, estimates in choices)


def _launch_record(launch: Launch, device: Accelerator, dtype: str) -> dict[str, Any]:
    return {**asdict(launch), "bytes": launch.bytes, "seconds": launch.floor(device, dtype)}


def _record(device: Accelerator, work: Work, estimates: dict[str, Estimate]) -> dict[str, Any]:
    designs = {}
    for name, found in estimates.items():
        passes = {"forward": found.forward, "backward": found.backward}
        designs[name] = {
            **{
                which: [_launch_record(launch, device, work.dtype) for launch in launches]
                for which, launches in passes.items()
            },
            "seconds": found.seconds,
            "ratios": found.ratios,
        }
    return {"device": device.name, "active": work.active, "designs": designs}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        sets = active_sets(options.pyramid, options.top_k)
        work = _work(options, options.active or list(sets)[-1])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    records, judged = [], []
    if not options.json:
        console.print(
            f"{work.tokens} tokens, in {options.in_features}, out {options.out_features}, r {options.rank}, pyramid "
            f"{options.pyramid}, top-{options.top_k}, {options.dtype}; judged with the scales {work.active} in use: "
            f"R = {work.shrunk} numbers a row, C = {work.columns} columns"
        )
    for device in (ACCELERATORS[name] for name in options.device):
        estimates = {name: estimate(name, work, device) for name in DESIGNS}
        lines = verdicts(device, estimates, options.judge)
        judged += lines
        records.append(_record(device, work, estimates))
        if not options.json:
            choices = [
                (active, chance, {name: estimate(name, _work(options, active), device) for name in DESIGNS})
                for active, chance in sets.items()
            ]
            console.print(_design_table(device, work, estimates))
            if options.launches:
                console.print(_launch_table(device, work.dtype, estimates))
            console.print(_choices_table(device, choices))
    met = all(met for met, _ in judged)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "launches")}
        verdict = {"target": TARGET, "met": met, "lines": [line for _, line in judged]}
        print(json.dumps({"settings": settings, "devices": records, "verdict": verdict}, indent=1))
    else:
        for reached, line in judged:
            word = "[green]met[/]   " if reached else "[red]missed[/]"
            console.print(f"{word} {line}", highlight=False)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
