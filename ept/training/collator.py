"""From the rows of tasks to padded batches: datasets, the balanced order, and a collator for each kind of model.

Every collator takes a list of rows (``text``, ``text_pair``, ``label``, ``choices`` for multiple choice, ``task_id``)
and returns int64 tensors ``input_ids`` and ``attention_mask [batch, length]``, ``task_ids [batch]`` and ``labels``,
padded to the longest row of the batch. ``labels`` are what the model's own loss takes; with ``generate=True``
(text-to-label models under evaluation) they are the rows' own labels, float32 ``[batch]``, and the inputs hold
prompts only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Table
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import TaskData, TaskSpec, prompt, target
from ..trainers import TaskCollator
from ..tuner.calls import IGNORED

Row = dict[str, Any]
Batch = dict[str, Tensor]
MODEL_KINDS = ("encoder", "seq2seq", "causal")


def make_collator(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    specs: Mapping[int, TaskSpec],
    *,
    max_length: int = 128,
    generate: bool = False,
) -> Callable[[Sequence[Row]], Batch]:
    """The collator for a kind of model.

    Args:
        kind: one of ``MODEL_KINDS``.
        tokenizer: the model's; not modified.
        specs: every task by its id (text-to-label models need them for prompt and target).
        max_length: tokens of a row at most; longer ones are truncated.
        generate: True for evaluation batches of a text-to-label model.

    Raises:
        ValueError: unknown kind, max_length below 8, or a tokenizer that has neither a padding nor an end token.
    """
    if kind not in MODEL_KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(MODEL_KINDS)}")
    if max_length < 8:
        raise ValueError(f"max_length is {max_length}; at least 8 tokens are needed")
    tokenizer = copy.deepcopy(tokenizer)  # padding and truncation sides are set below, the caller's stay as they are
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has neither pad_token nor eos_token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    if kind == "encoder":
        return EncoderCollator(tokenizer, max_length)
    if kind == "seq2seq":
        return Seq2SeqCollator(tokenizer, specs, max_length, generate)
    return CausalCollator(tokenizer, specs, max_length, generate)


class EncoderCollator:
    """Texts or text pairs; ``labels`` float32 ``[batch]`` (class indices and regression labels share a batch)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, rows: Sequence[Row]) -> Batch:
        encoded: list[dict[str, list[int]]] = [{}] * len(rows)
        for paired in (False, True):  # a tokenizer call takes only texts or only pairs, a mixed batch has both
            places = [place for place, row in enumerate(rows) if (row["text_pair"] is not None) is paired]
            if places:
                columns = [[rows[place][name] for place in places] for name in ("text", "text_pair")[: 1 + paired]]
                part = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
                for position, place in enumerate(places):
                    encoded[place] = {name: values[position] for name, values in part.items()}
        return {**self.tokenizer.pad(encoded, return_tensors="pt"), **_ids_and_labels(rows)}


class Seq2SeqCollator:
    """Prompts in, target texts as ``labels`` int64 ``[batch, target length]``, padded with -100."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, specs: Mapping[int, TaskSpec], max_length: int, generate: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.specs = specs
        self.max_length = max_length
        self.generate = generate

    def __call__(self, rows: Sequence[Row]) -> Batch:
        prompts = [prompt(self.specs[row["task_id"]], row) for row in rows]
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        batch = dict(self.tokenizer(prompts, **options))
        batch.pop("token_type_ids", None)
        batch |= _ids_and_labels(rows)
        if not self.generate:
            targets = [target(self.specs[row["task_id"]], row) for row in rows]
            encoded = self.tokenizer(text_target=targets, **options)
            batch["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        return batch


class CausalCollator:
    """Prompt, target and end token in a sequence; ``labels`` int64 ``[batch, length]`` are -100 on prompt and padding.

    Prompt and target are tokenised apart, so generation starts exactly where training did. Training batches are
    padded on the right; prompts for generation on the left. A prompt that is too long loses its beginning: its end
    asks the question.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, specs: Mapping[int, TaskSpec], max_length: int, generate: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.truncation_side = "left"
        self.tokenizer.padding_side = "left" if generate else "right"
        self.specs = specs
        self.max_length = max_length
        self.generate = generate

    def __call__(self, rows: Sequence[Row]) -> Batch:
        prompts = [prompt(self.specs[row["task_id"]], row) for row in rows]
        targets = [self._target_ids(row) for row in rows]
        room = self.max_length - max(map(len, targets))
        if room < 1:
            raise ValueError(f"max_length is {self.max_length}, but a target has {max(map(len, targets))} tokens")
        heads = self._prompt_ids(prompts, room)
        if self.generate:
            return {**self._pad(heads), **_ids_and_labels(rows)}
        batch = self._pad([head + tail for head, tail in zip(heads, targets, strict=True)])
        batch |= _ids_and_labels(rows)
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for row, (head, tail) in enumerate(zip(heads, targets, strict=True)):
            batch["labels"][row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
        return batch

    def _target_ids(self, row: Row) -> list[int]:
        text = " " + target(self.specs[row["task_id"]], row)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def _prompt_ids(self, prompts: list[str], room: int) -> list[list[int]]:
        encoded = self.tokenizer(prompts, truncation=True, max_length=room)["input_ids"]
        return [ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids for ids in encoded]

    def _pad(self, ids: list[list[int]]) -> Batch:
        return dict(self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))


class TaskIdsCollator(TaskCollator):
    """``ept.TaskCollator`` as it was called before: ``name`` is the rows' entry that holds an id."""

    def __init__(self, collate: Callable[[list[Row]], Mapping[str, Any]], name: str = "task_ids") -> None:
        super().__init__(collate, column=name)


def _ids_and_labels(rows: Sequence[Row]) -> Batch:
    return {
        "task_ids": torch.tensor([row["task_id"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows], dtype=torch.float32),
    }


class TaskRows(Dataset):
    """Concatenation of tables in the common columns of ``ept.data``; items are dicts with an added int ``task_id``.

    Args:
        tables: one per task; rows of ``tables[i]`` get the id ``task_ids[i]``.
        task_ids: as many ids.
    """

    def __init__(self, tables: Sequence[Table], task_ids: Sequence[int]) -> None:
        self.sizes = tuple(len(table) for table in tables)
        self._tables = tuple(tables)
        self._task_ids = tuple(task_ids)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        row = self._tables[place][int(index - self._ends[place] + self.sizes[place])]
        return {**row, "task_id": self._task_ids[place]}


def training_rows(tasks: Sequence[TaskData], task_ids: Sequence[int]) -> TaskRows:
    """The train splits of all tasks, under one id each."""
    return TaskRows([task.train for task in tasks], task_ids)


def evaluation_rows(task: TaskData, task_id: int, limit: int | None = None) -> TaskRows:
    """A task's validation split: all rows, or ``limit`` of them drawn once and for all, ordered by length.

    The draw depends on nothing but the split's size, so every evaluation scores the same rows. Neighbours of similar
    length keep padding, and with it the cost, low.
    """
    table = task.validation
    chosen = np.arange(len(table))
    if limit is not None and limit < len(table):
        chosen = np.random.default_rng(0).permutation(len(table))[:limit]
    lengths = np.array(
        [len(text) + len(pair or "") for text, pair in zip(table["text"], table["text_pair"], strict=True)]
    )
    chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    return TaskRows([table.select(chosen)], [task_id])
