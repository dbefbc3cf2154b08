"""From rows of ``ept.data`` to padded batches, for the three kinds of model.

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

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ept.data import TaskSpec, prompt, target

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


class TaskIdsCollator:
    """Any collator of transformers or TRL, with the task ids of its rows in the batch.

    A collator that packs samples into one row (``DataCollatorWithFlattening``, TRL's with ``padding_free``) gives
    ``task_ids [samples]``, which the model spreads over their tokens, and one that pads them the same.

    Args:
        collate: what makes a batch of rows without task ids.
        name: of the rows' entry that holds an id, or, of rows that were packed before (TRL's ``packing``), an id for
            every token.
    """

    def __init__(self, collate: Callable[[list[Row]], Mapping[str, Any]], name: str = "task_ids") -> None:
        self.collate, self.name = collate, name

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of ``rows``.

        Raises:
            ValueError: ids for every token of some rows only, or another number of them than of tokens.
        """
        ids = [row[self.name] for row in rows]
        batch = dict(self.collate([{key: value for key, value in row.items() if key != self.name} for row in rows]))
        each = [torch.as_tensor(own).dim() == 1 for own in ids]
        if not any(each):
            return {**batch, "task_ids": torch.as_tensor(ids)}
        shape = batch["input_ids"].shape
        tokens = [torch.as_tensor(own).reshape(-1) for own in ids]
        lengths = [len(own) for own in tokens]
        if not all(each) or sum(lengths) != shape.numel():
            raise ValueError(
                f"{self.name} must be one for each row or one for each token, with no padding among these; got "
                f"{lengths} for input_ids {list(shape)}"
            )
        return {**batch, "task_ids": torch.cat(tokens).view(shape)}


def _ids_and_labels(rows: Sequence[Row]) -> Batch:
    return {
        "task_ids": torch.tensor([row["task_id"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows], dtype=torch.float32),
    }
