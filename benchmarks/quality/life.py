"""What the benchmarks of an adapter's later life share: short runs, scores under any routing, a result file."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from training_run import arguments, where
from transformers import PreTrainedTokenizerBase

from ept.data import DataError, TaskData, load_tasks
from ept.files import write_json
from ept.training import EPTTrainer
from ept.training.collator import evaluation_rows, make_collator
from ept.training.evaluate import task_metrics
from ept.training.multitask import base_model, device_of, ids_of_tasks
from ept.training.options import RunSettings
from ept.training.report import quieten_libraries
from ept.training.run import make_adapted

#: ``task_ids`` of a batch, from its true ids ``[N]``.
Routing = Callable[[dict[str, Tensor]], Any]


def build_parser(description: str, output: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default="sentiment", help="folder with an index.json (default: the embedded data)")
    parser.add_argument("--tasks", help="names, separated by commas (default: all)")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--eval-limit", type=int, default=400, help="score this many validation rows a task at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / output)
    return parser


def parse(parser: argparse.ArgumentParser, least_tasks: int) -> tuple[argparse.Namespace, list[TaskData]]:
    """Options and tasks; exits with a named error if one is bad."""
    options = parser.parse_args()
    quieten_libraries()
    for name in ("steps", "batch_size", "eval_limit"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {getattr(options, name)}")
    try:
        tasks = load_tasks(options.data, options.tasks.split(",") if options.tasks else None)
    except DataError as error:
        parser.error(f"argument --data or --tasks: {error}")
    if len(tasks) < least_tasks:
        parser.error(f"argument --tasks: at least {least_tasks} are needed, got {len(tasks)}")
    return options, tasks


def new_model(options: argparse.Namespace, tasks: list[TaskData]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """An EPT adapter for these tasks that will learn ``task_ids="auto"``, and the tokenizer."""
    return make_adapted(_settings(options, ""), tasks)


def train(
    options: argparse.Namespace, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: list[TaskData], steps: int
) -> None:
    """Train whatever of the model is trainable on these tasks, with the recipe's defaults."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = arguments(_settings(options, folder, steps), bf16=options.bf16)
        EPTTrainer(model, chosen, tasks=tasks, processing_class=tokenizer).train()


def batches(
    options: argparse.Namespace,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskData,
    task_id: int,
    limit: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Validation batches of one task under an id."""
    collate = make_collator("encoder", tokenizer, {task_id: task.spec}, max_length=options.max_length)
    rows = evaluation_rows(task, task_id, limit or options.eval_limit)
    for batch in DataLoader(rows, batch_size=50, collate_fn=collate):
        yield {name: value.to(device_of(model)) for name, value in batch.items()}


@torch.no_grad()
def score(
    options: argparse.Namespace,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskData,
    routing: Routing = lambda batch: batch["task_ids"],
) -> float:
    """Headline metric of a task's validation rows under its own head, the adapter routed by ``routing``."""
    model.eval()
    (task_id,) = ids_of_tasks(model, [task])
    predictions, labels = [], []
    for batch in batches(options, model, tokenizer, task, task_id):
        labels.append(batch.pop("labels"))
        own = batch["task_ids"]
        with torch.autocast(device_of(model).type, torch.bfloat16, enabled=options.bf16):
            logits = model(**{**batch, "task_ids": routing(batch)}, head_ids=own).logits
        predictions.append(base_model(model).predict(logits, own))
    found = task_metrics(task.spec, torch.cat(predictions).numpy(), torch.cat(labels).numpy(), generated=False)
    return round(float(found[task.spec.metrics[0]]), 4)


def write(options: argparse.Namespace, model: PeftModel, tasks: list[TaskData], results: dict[str, Any]) -> None:
    """The results with what they depend on, as one JSON file."""
    shared = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
    content = {
        "settings": shared,
        "data": "sentiment" if options.data == "sentiment" else "a folder",
        "metrics": {task.spec.name: task.spec.metrics[0] for task in tasks},
        "rows": {task.spec.name: [len(task.train), len(task.validation)] for task in tasks},
        **results,
        **where(device_of(model)),
    }
    write_json(options.output, content)
    print(json.dumps(results, indent=1))
    print(options.output)


def _settings(options: argparse.Namespace, folder: str, steps: int | None = None) -> RunSettings:
    return RunSettings(
        output=folder,
        model=options.model,
        seed=options.seed,
        max_steps=steps or options.steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        save_steps=0,
        set={"auto_routing": True},
        quiet=True,
    )
