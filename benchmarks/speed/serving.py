"""Time of inference on a batch that holds 1, 2, 8 or 64 tasks, beside the frozen and the merged model, in one process.

    python benchmarks/speed/serving.py                                 # MiniLM, one 768 x 768 layer, a call of 8 tokens
    python benchmarks/speed/serving.py --cases layer --length 64 --rounds 41

Every adapter has 64 tasks. ``merged`` serves one of them; ``token`` routes every token by itself (routing="token");
``anew`` folds the kernels in every call, as training does, where the others keep them while no parameter changes. The
candidates take turns, in an order drawn anew every round; medians, and quantiles of the ratio within a round. Each is
checked first: a row of a mixed batch must come out as it does alone.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Timed, alternate, load, pick_device, provenance, ratio_spread, spread
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ept
from ept import models
from ept.files import write_json
from ept_kernels import backend_for

TASKS = 64
MIXES = (1, 2, 8, 64)
CASES = ("model", "layer", "small")
#: Largest relative difference of a row computed in a mixed batch and alone.
TOLERANCE = 1e-4

Call = Callable[..., Tensor]


def awaken(module: nn.Module) -> nn.Module:
    """Kernels as after training: zero ones would be skipped. In evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, ept.pyramid.adapter.PyramidAdapter):
            for kernel in part.kernels:
                kernel.data.copy_(0.1 * torch.randn(kernel.shape, generator=generator))
    return module.eval()


def check_rows(call: Call, batch: Tensor, ids: Tensor) -> None:
    """Raise RuntimeError unless rows of a mixed batch come out as alone."""
    together = call(batch, ids)
    for row in range(0, len(batch), max(1, len(batch) // 8)):
        alone = call(batch[row : row + 1], ids[row : row + 1])[0]
        error = ((together[row] - alone).norm() / alone.norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"row {row} of a batch with {len(ids.unique())} tasks is off by {error:.1e}: no speed")


def mixed_candidates(call: Call, batch: Tensor, mixes: Sequence[int]) -> dict[str, Timed]:
    """``call`` on ``batch``, its rows of so many tasks in turn."""
    found = {}
    for tasks in mixes:
        ids = torch.arange(len(batch), device=batch.device) % tasks
        check_rows(call, batch, ids)
        found[f"{tasks} tasks"] = Timed(lambda ids=ids: call(batch, ids))
    return found


def layer_candidates(features: int, batch: Tensor, mixes: Sequence[int]) -> dict[str, Timed]:
    """One square layer on ``batch [samples, tokens, features]``."""
    torch.manual_seed(0)
    linear = nn.Linear(features, features).to(batch.device).requires_grad_(False)
    layer = awaken(ept.EPTLinear.from_linear(linear, ept.EPTConfig(num_tasks=TASKS)))
    anew = copy.deepcopy(layer).train()  # without dropout the same but for what is kept
    merged = copy.deepcopy(layer)
    merged.merge(0)
    by_token = awaken(ept.EPTLinear.from_linear(linear, ept.EPTConfig(num_tasks=TASKS, routing="token")))
    most = torch.arange(len(batch), device=batch.device) % mixes[-1]
    return {
        "frozen": Timed(lambda: linear(batch)),
        "merged": Timed(lambda: merged(batch)),
        "one id": Timed(lambda: layer(batch, 0)),
        **mixed_candidates(layer, batch, mixes),
        "one id, anew": Timed(lambda: anew(batch, 0)),
        f"{mixes[-1]} tasks, anew": Timed(lambda: anew(batch, most)),
        "token": Timed(lambda: by_token(batch)),
    }


def model_candidates(base: nn.Module, ids: Tensor, mixes: Sequence[int]) -> dict[str, Timed]:
    """A whole encoder or decoder on ``ids [samples, tokens]``."""

    def adapted(**options: Any) -> nn.Module:
        config = ept.EPTConfig(num_tasks=TASKS, target_modules=models.target_modules(base), **options)
        return awaken(get_peft_model(copy.deepcopy(base), config))

    model, by_token = adapted(), adapted(routing="token")
    merged = copy.deepcopy(model).merge_and_unload(task=0)
    frozen = copy.deepcopy(base).eval()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def call(batch: Tensor, tasks: Tensor) -> Tensor:
        return model(input_ids=batch, attention_mask=torch.ones_like(batch), task_ids=tasks)[0]

    return {
        "frozen": Timed(lambda: frozen(**inputs)),
        "merged": Timed(lambda: merged(**inputs)),
        "one id": Timed(lambda: model(**inputs, task_ids=0)),
        **mixed_candidates(call, ids, mixes),
        "token": Timed(lambda: by_token(**inputs)),
    }


def candidates_of(case: str, settings: argparse.Namespace, device: torch.device) -> tuple[str, dict[str, Timed]]:
    """A case's title and what it times."""
    torch.manual_seed(1)
    samples, length = settings.samples, settings.length
    if case == "model":
        base = models.load(settings.model).model.to(device)
        ids = torch.randint(base.get_input_embeddings().num_embeddings, (samples, length), device=device)
        return f"{settings.model}, {samples} x {length} tokens", model_candidates(base, ids, settings.mixes)
    features, rows = (768, (samples, length)) if case == "layer" else (384, (8, 1))
    batch = torch.randn(*rows, features, device=device)
    mixes = [tasks for tasks in settings.mixes if tasks <= rows[0]]
    title = f"{features} x {features} layer, {rows[0]} x {rows[1]} tokens"
    return title, layer_candidates(features, batch, mixes)


def report(title: str, samples: dict[str, list[float]]) -> tuple[Table, dict[str, dict[str, float]]]:
    """The table to print, and the same numbers for the record."""
    table, record = Table(title=title), {}
    for column in ("batch", "ms", "over one task (20 % to 80 %)", "over frozen", "over merged"):
        table.add_column(column, justify="left" if column == "batch" else "right")
    for name, times in samples.items():
        one, frozen, merged = (ratio_spread(times, samples[other]) for other in ("1 tasks", "frozen", "merged"))
        milliseconds = 1e3 * spread(times).median
        record[name] = {
            "ms": milliseconds,
            "over_one_task": one.median,
            "over_one_task_low": one.low,
            "over_one_task_high": one.high,
            "over_frozen": frozen.median,
            "over_merged": merged.median,
        }
        table.add_row(
            name,
            f"{milliseconds:.4g}",
            f"{one.median:.3f} ({one.low:.3f} to {one.high:.3f})",
            f"{frozen.median:.3f}",
            f"{merged.median:.3f}",
        )
    return table, record


def main() -> None:
    parser = argparse.ArgumentParser(description="Inference on batches of several tasks.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--model", default="minilm", help="minilm, smollm2, a directory or a hub id")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--budget", type=float, default=300, help="seconds a case after which no further round starts")
    parser.add_argument("--device", help="default: the GPU, else the CPU")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    settings = parser.parse_args()
    settings.mixes = [tasks for tasks in MIXES if tasks <= settings.samples]
    device = pick_device(settings.device)
    console, results = Console(), {}
    with torch.inference_mode():
        for case in settings.cases:
            title, candidates = candidates_of(case, settings, device)
            samples = alternate(candidates, settings.rounds, device, budget=settings.budget)
            table, record = report(title, samples)
            results[case] = {
                "title": title,
                "rounds": len(samples["frozen"]),
                "load": load(),
                "candidates": record,
            }
            console.print(table)
    backend = backend_for(device).name
    where = provenance(device)
    console.print(f"{where['device']}, torch {where['torch']}, backend {backend}, load average {load()}")
    if settings.json is not None:
        write_json(settings.json, {"backend": backend, **where, "cases": results})


if __name__ == "__main__":
    main()
