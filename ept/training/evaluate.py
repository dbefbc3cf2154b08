"""Predictions and metrics of every task, by classification head or by greedy generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..data import TaskData, TaskSpec, metrics, parse_target
from .collator import evaluation_rows, make_collator
from .multitask import base_model, device_of, ids_of_tasks, model_kind, takes_task_ids

UNPARSEABLE = "unparseable"


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskData],
    *,
    batch_size: int = 64,
    max_length: int = 128,
    limit: int | None = None,
    max_new_tokens: int = 16,
) -> dict[str, dict[str, float]]:
    """Metrics of every task's validation split, ``{task: {metric: value}}``; the spec's first metric is the headline.

    Text-to-label models also get ``unparseable``, the number of answers that name no label.

    Args:
        model: a MultiTaskEncoder or text-to-label model, with or without an adapter; left in the mode it was in.
        limit: score this many rows a task at most.
        max_new_tokens: length limit of a generated answer.
    """
    ids = ids_of_tasks(model, tasks)
    specs = {task_id: task.spec for task_id, task in zip(ids, tasks, strict=True)}
    kind, device = model_kind(model), device_of(model)
    collate = make_collator(kind, tokenizer, specs, max_length=max_length, generate=kind != "encoder")
    was_training = model.training
    model.eval()
    results = {}
    for task_id, task in zip(ids, tasks, strict=True):
        predictions, labels = [], []
        for batch in DataLoader(evaluation_rows(task, task_id, limit), batch_size=batch_size, collate_fn=collate):
            batch = {name: value.to(device) for name, value in batch.items()}
            predicted, _ = predict_batch(model, batch, task.spec, tokenizer, max_new_tokens=max_new_tokens)
            predictions.append(predicted.cpu())
            labels.append(batch["labels"].cpu())
        results[task.spec.name] = task_metrics(
            task.spec, torch.cat(predictions).numpy(), torch.cat(labels).numpy(), generated=kind != "encoder"
        )
    model.train(was_training)
    return results


@torch.no_grad()
def predict_batch(
    model: Any,
    batch: Mapping[str, Tensor],
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 16,
) -> tuple[Tensor, Tensor | None]:
    """Predictions and losses (None for generated answers), fp32 ``[batch]`` each, of one task's evaluation batch.

    A prediction is a class index, a choice's index or a number; NaN where a generated answer names no label.
    """
    inputs = {name: value for name, value in batch.items() if name != "task_ids" or takes_task_ids(model)}
    labels = inputs.pop("labels")
    if model_kind(model) == "encoder":
        logits = model(**inputs).logits
        encoder: Any = base_model(model)
        return encoder.predict(logits, batch["task_ids"]), encoder.sample_losses(logits, labels, batch["task_ids"])
    prompt_length = 0 if model_kind(model) == "seq2seq" else batch["input_ids"].shape[1]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generated = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad
    )
    texts = tokenizer.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)
    values = [parse_target(spec, text) for text in texts]
    numbers = [float("nan") if value is None else float(value) for value in values]
    return torch.tensor(numbers, dtype=torch.float32, device=generated.device), None


def task_metrics(spec: TaskSpec, predictions: np.ndarray, labels: np.ndarray, *, generated: bool) -> dict[str, float]:
    """The spec's metrics of ``predictions [N]``, NaN meaning unparseable, against ``labels [N]``.

    An unparseable answer counts against the model: as no class (-1), or as the middle of the regression range, which
    tells nothing. With ``generated`` their number is reported as ``unparseable``.
    """
    missing = np.isnan(predictions)
    if spec.kind == "regression":
        low, high = spec.label_range if spec.label_range is not None else (labels.min(), labels.max())
        filled = np.where(missing, (low + high) / 2, predictions)
    else:
        labels = labels.astype(np.int64)
        filled = np.where(missing, -1, predictions).astype(np.int64)
    found = metrics.compute(spec, filled, labels)
    return {**found, UNPARSEABLE: int(missing.sum())} if generated else found


def mean_headline(specs: Sequence[TaskSpec], results: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over the tasks of each one's headline metric."""
    return float(np.mean([results[spec.name][spec.metrics[0]] for spec in specs]))


def baselines(tasks: Sequence[TaskData], limit: int | None = None) -> dict[str, dict[str, float]]:
    """What knowing only the train labels scores on the same rows: majority class, or zero correlation."""
    results = {}
    for task in tasks:
        rows = evaluation_rows(task, 0, limit)
        labels = np.array([rows[i]["label"] for i in range(len(rows))])
        results[task.spec.name] = metrics.baseline(task.spec, np.array(task.train["label"]), labels)
    return results
