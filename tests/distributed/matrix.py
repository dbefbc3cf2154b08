"""Every run with every number of processes against one process, as a table: ``make scaleout``.

``python tests/distributed/matrix.py [--processes 2 4] [--only WORD]``; the exit status is 1 where a limit is passed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from compare import distance, loss_distance, score_distance, unequal
from launch import launch
from safetensors.torch import load_file
from scenarios import RUNS, checkpointed, command_line, data_parallel, own_loop, sharded

# Limits on (adapter over the way trained, loss); the log of losses is fp32.
EXACT = (1e-9, 5e-6)
ROUNDED = (1e-3, 1e-4)  # fp32: AdamW makes steps of the rate out of gradients that are rounding

REFUSED = ("unused", "tucka encoder FSDP2, not started")


def limits(name: str) -> tuple[float, float]:
    return ROUNDED if name.endswith("float32") else EXACT


def adapter_file(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-") / "adapter" / "adapter_model.safetensors"


def compare(
    name: str, ranks: list[dict[str, Any]], wanted: Mapping[str, Any], folder: Path, alone: Path
) -> tuple[str, bool]:
    """What was found, in words, and whether it is as it should be."""
    make = RUNS[name].make
    errors = [result.get("error") for result in ranks]
    if any(errors) or name in REFUSED:
        return f"error on every rank: {str(errors[0])[:70]}...", name in REFUSED and all(errors)
    if make is command_line:
        return "ran to its end", True
    if make is checkpointed:
        pairs = [(result["kept"], result["recomputed"]) for result in ranks]
        if not any(map(unequal, pairs)):
            return "gradients kept and recomputed: same bits", True
        apart = max(
            distance(*pair, {name: torch.zeros_like(value) for name, value in pair[0].items()}) for pair in pairs
        )
        return f"gradients kept and recomputed: {apart:.1e}", "seq2seq" in name and apart < EXACT[0]
    loss = loss_distance(ranks[0]["losses"], wanted["losses"])
    if make is sharded:
        saved, expected = load_file(adapter_file(folder, name)), load_file(adapter_file(alone, name))
        way = distance(saved, expected, {key: torch.zeros_like(value) for key, value in saved.items()})
    else:
        way = distance(ranks[0]["after"], wanted["after"], wanted["before"])
    words, good = f"adapter {way:.1e}, loss {loss:.1e}", way < limits(name)[0] and loss < limits(name)[1]
    if make is not own_loop:
        score = score_distance(ranks[0]["scores"], wanted["scores"])
        words, good = f"{words}, scores {score:.1e}", good and (score < 1e-5 or limits(name) != EXACT)
    if make is data_parallel:
        same = not (unequal([r["after"] for r in ranks]) or unequal([r["buffers"] for r in ranks]))
        words, good = f"{words}, ranks {'same bits' if same else 'DIFFERENT'}", good and same
    return words, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", default="", help="runs with this in their name")
    options = parser.parse_args()
    names = [name for name in RUNS if options.only in name]
    failed = 0
    print("| run | processes | against one process | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        alone = Path(root) / "1"
        wanted = launch(1, names, alone)
        for processes in options.processes:
            folder = Path(root) / str(processes)
            found = launch(processes, names, folder)
            for name in names:
                words, good = compare(name, found[name], wanted[name][0], folder, alone)
                failed += not good
                print(f"| {name} | {processes} | {words} | {'' if good else 'FAILED'} |", flush=True)
    print(f"\n{len(names) * len(options.processes)} comparisons, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
