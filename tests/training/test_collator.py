"""Batches of the three kinds of model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import DataCollatorWithFlattening

from ept.data import TaskData, prompt, target
from ept.training import TaskIdsCollator, make_collator, training_rows


@pytest.fixture
def collator(toys: SimpleNamespace) -> Callable[..., Callable]:
    """Makes the collator of a kind for some tasks."""

    def make(kind: str, tasks: list[TaskData], **options: object) -> Callable:
        specs = {i: task.spec for i, task in enumerate(tasks)}
        return make_collator(kind, toys.make_tokenizer(kind), specs, **options)

    return make


def _rows(tasks: list[TaskData], per_task: int = 3) -> list[dict]:
    rows = training_rows(tasks, range(len(tasks)))
    starts = [sum(rows.sizes[:task]) for task in range(len(tasks))]
    return [rows[starts[task] + i] for i in range(per_task) for task in range(len(tasks))]


def test_encoder_batch_mixes_texts_and_pairs_in_order(
    collator: Callable, toys: SimpleNamespace, tasks: list[TaskData]
) -> None:
    rows = _rows(tasks)
    batch = collator("encoder", tasks)(rows)
    tokenizer = toys.make_tokenizer("encoder")
    for i, row in enumerate(rows):
        alone = tokenizer(row["text"], row["text_pair"]) if row["text_pair"] else tokenizer(row["text"])
        length = len(alone["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == alone["input_ids"]
        assert batch["token_type_ids"][i, :length].tolist() == alone["token_type_ids"]
        assert batch["attention_mask"][i].sum() == length
        assert batch["labels"][i] == row["label"]
    assert batch["task_ids"].tolist() == [0, 1, 2] * 3
    assert batch["labels"].dtype == torch.float32
    assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()  # padded no further than needed


def test_encoder_truncates(collator: Callable, tasks: list[TaskData]) -> None:
    assert collator("encoder", tasks, max_length=8)(_rows(tasks))["input_ids"].shape[1] == 8


def test_seq2seq_labels_are_targets_padded_with_ignored(
    collator: Callable, toys: SimpleNamespace, tasks: list[TaskData]
) -> None:
    rows = _rows(tasks)
    batch = collator("seq2seq", tasks)(rows)
    tokenizer = toys.make_tokenizer("seq2seq")
    for i, row in enumerate(rows):
        spec = tasks[row["task_id"]].spec
        wanted = tokenizer(target(spec, row))["input_ids"]
        assert batch["labels"][i, : len(wanted)].tolist() == wanted
        assert wanted[-1] == toys.vocabulary["[EOS]"]
        assert (batch["labels"][i, len(wanted) :] == -100).all()
        text = tokenizer(prompt(spec, row))["input_ids"]
        assert batch["input_ids"][i, : len(text)].tolist() == text


def test_causal_labels_cover_the_target_and_its_end_only(
    collator: Callable, toys: SimpleNamespace, tasks: list[TaskData]
) -> None:
    rows = _rows(tasks)
    batch = collator("causal", tasks)(rows)
    tokenizer = toys.make_tokenizer("causal")
    for i, row in enumerate(rows):
        spec = tasks[row["task_id"]].spec
        head = tokenizer(prompt(spec, row))["input_ids"]
        tail = [*tokenizer(" " + target(spec, row))["input_ids"], toys.vocabulary["[EOS]"]]
        end = len(head) + len(tail)
        assert batch["input_ids"][i, :end].tolist() == head + tail
        assert batch["labels"][i, len(head) : end].tolist() == tail
        assert (batch["labels"][i, : len(head)] == -100).all()
        assert (batch["labels"][i, end:] == -100).all()


def test_causal_prompts_for_generation_are_padded_on_the_left(collator: Callable, tasks: list[TaskData]) -> None:
    rows = _rows(tasks)
    batch = collator("causal", tasks, generate=True)(rows)
    assert batch["attention_mask"][:, -1].all()
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()
    assert batch["labels"].tolist() == [float(row["label"]) for row in rows]


def test_long_causal_prompts_keep_their_end(collator: Callable, toys: SimpleNamespace, tasks: list[TaskData]) -> None:
    rows = _rows(tasks)
    batch = collator("causal", tasks, max_length=10)(rows)
    assert batch["input_ids"].shape[1] == 10
    colon = toys.vocabulary[":"]  # of "answer:"
    first_label = (batch["labels"] != -100).int().argmax(1)
    assert (batch["input_ids"][torch.arange(len(rows)), first_label - 1] == colon).all()


def test_multiple_choice_targets_are_letters(collator: Callable, toys: SimpleNamespace, choice_task: TaskData) -> None:
    rows = [training_rows([choice_task], [0])[i] for i in range(4)]
    batch = collator("seq2seq", [choice_task])(rows)
    assert batch["labels"][:, 0].tolist() == [toys.vocabulary["ABC"[row["label"]]] for row in rows]


def test_the_callers_tokenizer_is_left_alone(toys: SimpleNamespace, tasks: list[TaskData]) -> None:
    tokenizer = toys.make_tokenizer("causal")
    before = (tokenizer.padding_side, tokenizer.truncation_side)
    make_collator("causal", tokenizer, {0: tasks[0].spec}, generate=True)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == before


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [("decoder", {}, "kind is 'decoder'; allowed: encoder, seq2seq, causal"), ("encoder", {"max_length": 3}, "is 3")],
)
def test_bad_arguments_are_named(
    toys: SimpleNamespace, tasks: list[TaskData], kind: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_collator(kind, toys.make_tokenizer("encoder"), {0: tasks[0].spec}, **options)


def test_a_target_longer_than_the_row_is_refused(collator: Callable, tasks: list[TaskData]) -> None:
    collate = collator("causal", tasks, max_length=8)
    collate.max_length = 1
    with pytest.raises(ValueError, match="max_length is 1"):
        collate(_rows(tasks))


def test_rows_that_are_flattened_keep_their_tasks() -> None:
    """One for each packed row; one for each token where rows were packed before."""
    rows = [{"input_ids": [5, 6, 7], "task_ids": 1}, {"input_ids": [8, 9], "task_ids": 0}]
    collate = TaskIdsCollator(DataCollatorWithFlattening())
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["task_ids"].tolist() == [1, 0]
    packed = [{**rows[0], "task_ids": [1, 1, 0]}, {**rows[1], "task_ids": [2, 2]}]
    assert collate(packed)["task_ids"].tolist() == [[1, 1, 0, 2, 2]]
    assert "task_ids" in packed[0], "the rows are the caller's"
    with pytest.raises(ValueError, match=r"one for each token.* got \[3, 1\] for input_ids \[1, 5\]"):
        collate([packed[0], rows[1]])
