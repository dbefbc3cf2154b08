"""Host time of a small EPT layer beside its frozen linear and PEFT's LoRA, in one process on a CPU.

    python benchmarks/speed/host_time.py                              # a table
    python benchmarks/speed/host_time.py --json runs/host_time.jsonl  # and a line for each row of it

A layer of few tokens takes as long as the host needs to start its work: on a GPU in every eager call, on a CPU where
the products are small. Candidates: EPT on backend ``cpu`` as it is; and ``gpu``, the orchestration of backend
``triton`` whose kernels are not started (``launch.runner`` does nothing) and whose products are tiny, so that what is
left is what the host does. Triton's own share of a launch is not in it, nor is the vendor library's; nor what a GPU
keeps between calls in inference.

*inference*: evaluation mode, no gradients; backend ``cpu`` finds its folded kernels kept. *forward*: training mode, a
graph is built. *forward+backward*: with the gradients of x and of everything trainable. Each sample is the processor
time of one thread for some calls; candidates take turns in random order, and the table says the median over the rounds
of the ratio to LoRA, which a slow minute of a shared machine leaves as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # lets backend triton serve a CPU; read when triton is imported

import torch
from harness import forced_backend, load, provenance
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import ept
from ept_kernels.triton import launch

PASSES = ("inference", "forward", "forward+backward")
RANK, ALPHA = 8, 32
#: Calls of one sample: short enough to fall between two time slices of other processes.
CALLS = 3


def _layers(features: int) -> dict[str, nn.Module]:
    """The frozen linear, PEFT's LoRA around it and EPT around it, nothing about the adapters zero."""
    base = nn.Linear(features, features).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"])
    lora = get_peft_model(nn.Sequential(OrderedDict(layer=base)), config).base_model.model.layer
    layer = ept.EPTLinear.from_linear(base, ept.EPTConfig(r=RANK, lora_alpha=ALPHA, num_tasks=1))
    with torch.no_grad():
        for parameter in (*layer.kernels, lora.lora_B["default"].weight):
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return {"linear": base, "lora": lora, "ept": layer}


def _call(layer: nn.Module, x: Tensor, cotangent: Tensor, which: str) -> Callable[[], object]:
    if which == "inference":

        def call() -> object:
            with torch.no_grad():
                return layer(x)

        return call
    if which == "forward":
        return lambda: layer(x)
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), inputs, cotangent)


def measure(features: int, tokens: int, backend: str, rounds: int) -> list[dict[str, object]]:
    """Microseconds of one call: a row for each pass, with the 10 % quantile of each layer and the median of the ratios.

    Args:
        features: of the square layers. tokens: rows of x.
        backend: ``cpu``, or ``gpu`` for the orchestration of backend ``triton`` without its launches.
        rounds: samples of each layer.
    """
    runner, kernels = launch.runner, {"cpu": "cpu", "gpu": "triton"}[backend]
    if backend == "gpu":
        launch.runner = lambda *_: None
    try:
        with forced_backend(kernels):
            return [_measure_pass(features, tokens, backend, which, rounds) for which in PASSES]
    finally:
        launch.runner = runner


def _measure_pass(features: int, tokens: int, backend: str, which: str, rounds: int) -> dict[str, object]:
    x = torch.randn(tokens, features, requires_grad=True)
    cotangent = torch.randn(tokens, features)
    layers = _layers(features)
    calls = {}
    for name, layer in layers.items():
        layer.train(which != "inference")
        calls[name] = _call(layer, x, cotangent, which)
        for _ in range(10):
            calls[name]()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffle, order = random.Random(0).shuffle, list(calls)
    gc.disable()  # a collection would land on whichever candidate happens to run
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                start = time.thread_time()
                for _ in range(CALLS):
                    calls[name]()
                samples[name].append((time.thread_time() - start) / CALLS * 1e6)
    finally:
        gc.enable()
    low = {name: statistics.quantiles(values, n=10, method="inclusive")[0] for name, values in samples.items()}
    ratios = [mine / theirs for mine, theirs in zip(samples["ept"], samples["lora"], strict=True)]
    return {
        "backend": backend,
        "features": features,
        "tokens": tokens,
        "pass": which,
        "rounds": rounds,
        **{f"{name}_us": round(value, 1) for name, value in low.items()},
        "ept_over_lora": round(statistics.median(ratios), 3),
        "load": load(),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows for readers."""
    lines = [
        "| backend | tokens x features | pass | linear, us | LoRA, us | EPT, us | EPT / LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{row['tokens']} x {row['features']}"
        numbers = f"{row['linear_us']} | {row['lora_us']} | {row['ept_us']} | {row['ept_over_lora']}"
        lines.append(f"| {row['backend']} | {size} | {row['pass']} | {numbers} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Host time of a small EPT layer beside PEFT's LoRA.")
    parser.add_argument("--rounds", type=int, default=120, help="samples of each candidate (default 300)")
    parser.add_argument("--json", type=Path, help="append a line for each row to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.rounds < 2:
        print(f"error: --rounds must be at least 2, got {options.rounds}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure(384, 8, "cpu", options.rounds) + measure(64, 2, "gpu", options.rounds)
    shared = provenance(torch.device("cpu"))
    print(f"{shared['device']}, one thread, torch {shared['torch']}, PEFT {shared['peft']}")
    print(table(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({**shared, **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
