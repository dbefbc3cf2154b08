"""Unlabelled input: the score of every task with its true id, with ``task_ids="auto"``, and with a random id.

    python benchmarks/quality/auto_tasks.py --bf16                # the embedded data, MiniLM
    python benchmarks/quality/auto_tasks.py --bf16 --data FOLDER  # tasks of a folder with an index.json

Head and metric are always the task's own: what differs is how the adapter is routed. ``telling`` compares ways to tell
the tasks apart: by the trained task embeddings or by prototypes of the pooled token embeddings, and in which
coordinates; it gives the share of samples whose likeliest task is the true one, and the mean weight of the true one.

Leave one out: an adapter that was trained on the other tasks serves the left-out one. There is no head for it, so one
is fitted to frozen features (ridge regression, or logistic regression for classes) of at most ``--probe-rows`` training
rows; the routing differs in nothing else. ``none`` is the base model alone, ``trained`` the adapter of all tasks with
the true id, under the same kind of head: the most that could be had.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from life import Routing, batches, build_parser, new_model, parse, score, train, write
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ept.data import TaskData
from ept.prototypes import input_representation
from ept.training.evaluate import task_metrics
from ept.training.multitask import base_model, device_of

Ways = dict[str, dict[str, float]]


def random_ids(num_tasks: int, seed: int) -> Routing:
    """Uniform over all tasks, the true one among them; the same draws every time."""
    generator = torch.Generator().manual_seed(seed)
    return lambda batch: torch.randint(num_tasks, batch["task_ids"].shape, generator=generator)


def routings(num_tasks: int, seed: int) -> dict[str, Routing]:
    return {
        "true id": lambda batch: batch["task_ids"],
        "auto": lambda batch: "auto",
        "random id": random_ids(num_tasks, seed),
    }


@torch.no_grad()
def telling(options: argparse.Namespace, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: list) -> Ways:
    """How well each way tells the tasks of validation rows apart."""
    model.eval()
    rows, true = [], []
    for task_id, task in enumerate(tasks):
        for batch in batches(options, model, tokenizer, task, task_id):
            rows.append(input_representation(model, (), batch))
            true.append(batch["task_ids"])
    z, true = torch.cat(rows), torch.cat(true)
    shared, temperature = model.base_model.ept_task_tables["default"], model.peft_config["default"].temperature
    prototypes, embeddings = shared.prototypes, shared.weight.detach()
    centre = prototypes.mean.mean(0)
    ways = {"prototypes, standardised (shipped)": prototypes.mixture(z, temperature).weights}
    compared = {"prototypes": (z, prototypes.mean), "prototypes, centred": (z - centre, prototypes.mean - centre)}
    if embeddings.shape[1] == z.shape[1]:
        middle = embeddings.mean(0)
        compared |= {
            "task embeddings": (z, embeddings),
            "task embeddings, centred": (z - centre, embeddings - middle),
        }
    for name, (left, right) in compared.items():
        ways[name] = (F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T / temperature).softmax(-1)
    return {
        name: {
            "right": round((weights.argmax(1) == true).float().mean().item(), 4),
            "weight of the true task": round(weights.gather(1, true[:, None]).mean().item(), 4),
        }
        for name, weights in ways.items()
    }


@torch.no_grad()
def cost(options: argparse.Namespace, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: list) -> dict:
    """Median time of a batch of 32 samples of all tasks, with hard ids and with "auto"; alternating."""
    parts = [next(batches(options, model, tokenizer, task, i, 32)) for i, task in enumerate(tasks)]
    batch = min(parts, key=lambda part: part["input_ids"].shape[1])
    batch = {name: value[:32] for name, value in batch.items() if name != "labels"}
    own = torch.arange(len(batch["input_ids"])) % len(tasks)
    seconds: dict[str, list[float]] = {"one id": [], "mixed ids": [], "auto": []}
    ids = {"one id": 0, "mixed ids": own, "auto": "auto"}
    for _ in range(25):
        for name, taken in seconds.items():
            start = time.perf_counter()
            model(**{**batch, "task_ids": ids[name]}, head_ids=own)
            taken.append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(taken), 1) for name, taken in seconds.items()}


@torch.no_grad()
def features(
    options: argparse.Namespace,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskData,
    routing: Routing | None,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Pooled hidden states ``[rows, hidden]`` and labels of a task's rows; without ``routing``, of the base model."""
    model.eval()
    seen, labels = [], []
    hook = base_model(model).heads.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
    with nullcontext() if routing is not None else model.disable_adapter():
        for batch in batches(options, model, tokenizer, task, 0, limit):
            labels.append(batch.pop("labels"))
            ids = routing(batch) if routing is not None else batch["task_ids"]
            with torch.autocast(device_of(model).type, torch.bfloat16, enabled=options.bf16):
                model(**{**batch, "task_ids": ids}, head_ids=0)
    hook.remove()
    return torch.cat(seen), torch.cat(labels)


def probe(task: TaskData, train_rows: tuple[Tensor, Tensor], test_rows: tuple[Tensor, Tensor]) -> float:
    """Headline metric of a head that is fitted to frozen features."""
    (x, y), (x_test, y_test) = train_rows, test_rows
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    head = nn.Linear(x.shape[1], task.spec.num_labels)
    nn.init.zeros_(head.weight)
    regression = task.spec.kind == "regression"
    low, spread = y.mean(), y.std()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        output = head(x)
        fit = F.mse_loss(output[:, 0], (y - low) / spread) if regression else F.cross_entropy(output, y.long())
        value = fit + 1e-2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        output = head(x_test)
    predictions = output[:, 0] * spread + low if regression else output.argmax(1).float()
    found = task_metrics(task.spec, predictions.numpy(), y_test.numpy(), generated=False)
    return round(float(found[task.spec.metrics[0]]), 4)


def leave_one_out(
    options: argparse.Namespace, full: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: list[TaskData]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Left-out task and ``{routing: score}``, one task after the other."""
    for left, task in enumerate(tasks):
        others = [other for other in tasks if other is not task]
        model, _ = new_model(options, others)
        train(options, model, tokenizer, others, options.steps)
        training_rows = dataclasses.replace(task, validation=task.train.shuffle(seed=options.seed))
        ways: dict[str, tuple[PeftModel, Routing | None]] = {
            "none": (model, None),
            "random id of the others": (model, random_ids(len(others), options.seed)),
            "auto over the others": (model, lambda batch: "auto"),
            "trained": (full, lambda batch, left=left: left),
        }
        yield (
            task.spec.name,
            {
                name: probe(
                    task,
                    features(options, adapted, tokenizer, training_rows, routing, options.probe_rows),
                    features(options, adapted, tokenizer, task, routing, options.eval_limit),
                )
                for name, (adapted, routing) in ways.items()
            },
        )


def main() -> int:
    parser = build_parser("Scores without task labels.", "auto_tasks.json")
    parser.add_argument("--probe-rows", type=int, default=1000, help="training rows of a left-out task's head")
    options, tasks = parse(parser, 3)
    model, tokenizer = new_model(options, tasks)
    train(options, model, tokenizer, tasks, options.steps)
    scores = {
        task.spec.name: {
            name: score(options, model, tokenizer, task, routing)
            for name, routing in routings(len(tasks), options.seed).items()
        }
        for task in tasks
    }
    scores["mean"] = {
        name: round(statistics.mean(found[name] for found in scores.values()), 4)
        for name in next(iter(scores.values()))
    }
    results = {
        "scores": scores,
        "telling": telling(options, model, tokenizer, tasks),
        "milliseconds": cost(options, model, tokenizer, tasks),
        "leave_one_out": {},
    }
    write(options, model, tasks, results)
    for name, found in leave_one_out(options, model, tokenizer, tasks):
        results["leave_one_out"][name] = found
        write(options, model, tasks, results)  # what is known so far, should the rest be cut off
    return 0


if __name__ == "__main__":
    sys.exit(main())
