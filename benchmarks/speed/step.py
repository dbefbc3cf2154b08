"""Time of one training step of a whole model: EPT beside PEFT's LoRA, on the same base, in one process.

    python benchmarks/speed/step.py                                   # MiniLM, 16 sentences of 64 tokens
    python benchmarks/speed/step.py --model smollm2 --batch 4 --length 128
    python benchmarks/speed/step.py --dtype bf16 --json runs/step.json

A step is forward, loss (with EPT's contrastive loss), backward and AdamW. Both adapt every linear layer of the blocks
at rank 8; a batch mixes all tasks. The methods take turns, in an order drawn anew every round; medians of the rounds,
and quantiles of the ratio within a round. Token ids are random: they decide what is computed, not how long it takes.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Timed, alternate, load, pick_device, provenance, ratio_spread, spread
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import ept
from ept import models

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
METHODS = ("lora", "ept")
#: Tokens that the decoder of an encoder-decoder is given: labels are short beside their inputs.
DECODED = 16


def frozen(base: nn.Module) -> nn.Module:
    """A copy of the base that trains nothing but passes gradients through every layer, as in front of an adapter."""
    model = copy.deepcopy(base).requires_grad_(False).train()
    vocabulary = model.get_input_embeddings().weight.shape
    for module in model.modules():  # encoder and decoder may each have a module of their own for one table
        if isinstance(module, nn.Embedding) and module.weight.shape == vocabulary:
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def adapted(method: str, base: nn.Module, tasks: int) -> PeftModel:
    """A copy of the base with an adapter of ``method`` on every linear layer of its blocks."""
    target = models.target_modules(base)
    if method == "ept":
        config: PeftConfig = ept.EPTConfig(num_tasks=tasks, target_modules=target)
    else:
        config = LoraConfig(r=8, lora_alpha=32, target_modules=target)
    return get_peft_model(copy.deepcopy(base), config).train()


def stepper(
    method: str, model: nn.Module, ids: torch.Tensor, tasks: int, kind: str, autocast: torch.dtype | None
) -> Callable[[], None]:
    """One training step of ``model`` on ``ids [batch, length]``; a decoder learns the first ``DECODED`` of them."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :DECODED]
    groups = (
        ept.parameter_groups(model, 1e-4) if method == "ept" else [p for p in model.parameters() if p.requires_grad]
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-4) if groups else None
    if method == "ept" and tasks > 1:
        inputs["task_ids"] = torch.arange(len(ids), device=ids.device) % tasks

    def step() -> None:
        with torch.autocast(ids.device.type, autocast, enabled=autocast is not None):
            output = model(**inputs)
            if kind in ("causal", "seq2seq"):
                logits = output.logits[:, :-1].float()
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1 : logits.shape[1] + 1].flatten())
            else:
                loss = output.last_hidden_state.float().mean(1).square().mean()
        if method == "ept":
            loss = loss + ept.auxiliary_loss(model)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Training step of a whole model, EPT beside LoRA.")
    parser.add_argument("--model", default="minilm", help="minilm, smollm2, a directory or a hub id")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast over fp32 weights")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no further round starts")
    parser.add_argument("--device", help="default: the GPU, else the CPU")
    parser.add_argument("--json", type=Path, help="append the result to this file, a line of JSON")
    settings = parser.parse_args()
    device = pick_device(settings.device)
    torch.manual_seed(0)
    loaded = models.load(settings.model)
    base, autocast = loaded.model.to(device, torch.float32), DTYPES[settings.dtype]
    vocabulary = base.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (settings.batch, settings.length), device=device)
    trainable, candidates = {}, {}
    for method in METHODS:
        model = adapted(method, base, settings.tasks)
        trainable[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        candidates[method] = Timed(stepper(method, model, ids, settings.tasks, loaded.kind, autocast))
    with Progress(transient=True) as bar:
        doing = bar.add_task("steps", total=1.0)
        samples = alternate(
            candidates,
            settings.rounds,
            device,
            budget=settings.budget,
            progress=lambda share: bar.update(doing, completed=share),
        )
    report(settings, device, samples, trainable)


def report(
    settings: argparse.Namespace, device: torch.device, samples: dict[str, list[float]], trainable: dict[str, int]
) -> None:
    """Print the table; append the record where one is asked for."""
    where = provenance(device)
    table = Table(
        title=f"{settings.model}, {settings.batch} x {settings.length} tokens, {settings.tasks} tasks, {settings.dtype}"
    )
    for column in ("method", "trained", "ms a step", "time over LoRA's (20 % to 80 %)"):
        table.add_column(column, justify="left" if column == "method" else "right")
    record = {
        **vars(settings),
        "json": None,
        "load": load(),
        "rounds": len(samples["lora"]),
        "trained": trainable,
        **where,
    }
    for method in METHODS:
        time, ratio = spread(samples[method]), ratio_spread(samples[method], samples["lora"])
        record[method] = {"ms": 1e3 * time.median, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        table.add_row(
            method,
            f"{trainable[method]:,}",
            f"{1e3 * time.median:.1f}",
            f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        )
    console = Console()
    console.print(table)
    console.print(f"{where['device']}, torch {where['torch']}, load average {record['load']}", highlight=False)
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        with settings.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
