"""The encoder with one head per task."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ept.data import TaskData, TaskSpec
from ept.training import MultiTaskEncoder, make_collator, training_rows
from ept.training.multitask import TaskHeads


def _batch(toys: SimpleNamespace, tasks: list[TaskData], per_task: int = 4) -> dict[str, torch.Tensor]:
    rows = training_rows(tasks, range(len(tasks)))
    starts = [sum(rows.sizes[:task]) for task in range(len(tasks))]
    picked = [rows[starts[task] + i] for i in range(per_task) for task in reversed(range(len(tasks)))]
    return make_collator("encoder", toys.make_tokenizer("encoder"), {i: t.spec for i, t in enumerate(tasks)})(picked)


def _expected_loss(model: MultiTaskEncoder, batch: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """One sample on its own, by its own head, without any of the vectorised code."""
    task = int(batch["task_ids"][row])
    spec = model.specs[task]
    keep = batch["attention_mask"][row].bool()
    inputs = {name: batch[name][row : row + 1, keep] for name in ("input_ids", "attention_mask", "token_type_ids")}
    pooled = model.encoder(**inputs).last_hidden_state[0].mean(0)
    logits = model.heads.by_task[f"head_{spec.name}"](pooled)
    label = batch["labels"][row]
    if spec.kind == "regression":
        low, high = spec.label_range
        return (logits[0] - (label - low) / (high - low)) ** 2
    return F.cross_entropy(logits[None], label.long()[None])


def test_loss_and_gradients_equal_a_loop_over_samples(toys: SimpleNamespace, tasks: list[TaskData]) -> None:
    model = toys.make_model("encoder", [task.spec for task in tasks]).double().eval()
    batch = _batch(toys, tasks)
    loss = model(**batch).loss
    expected = torch.stack([_expected_loss(model, batch, row) for row in range(len(batch["labels"]))]).mean()
    # The losses are fp32 by design; everything before them is fp64 here.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True, retain_graph=True)
    wanted = torch.autograd.grad(expected, parameters.values(), allow_unused=True)
    for name, a, b in zip(parameters, found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_logits_are_minus_infinity_where_a_task_has_fewer_labels(toys: SimpleNamespace, tasks: list[TaskData]) -> None:
    model = toys.make_model("encoder", [task.spec for task in tasks])
    batch = _batch(toys, tasks)
    logits = model(**batch).logits
    labels = torch.tensor([task.spec.num_labels for task in tasks])[batch["task_ids"]]
    assert logits.shape == (12, 3)
    assert torch.equal(logits.isneginf(), torch.arange(3) >= labels[:, None])


def test_predictions_are_classes_or_labels_in_their_unit(toys: SimpleNamespace, tasks: list[TaskData]) -> None:
    model = toys.make_model("encoder", [task.spec for task in tasks])
    infinity = float("inf")
    logits = torch.tensor([[0.1, 0.9, -infinity], [0.0, 1.0, 2.0], [0.25, -infinity, -infinity]])
    assert model.predict(logits, torch.tensor([0, 1, 2])).tolist() == [1.0, 2.0, 1.0]  # 0.25 of 0..4 is 1


def test_one_task_needs_no_ids_and_an_int_serves_a_batch(toys: SimpleNamespace, tasks: list[TaskData]) -> None:
    batch = _batch(toys, tasks[:1])
    ids = batch.pop("task_ids")
    model = toys.make_model("encoder", [tasks[0].spec]).eval()
    assert torch.equal(model(**batch).logits, model(**batch, task_ids=ids).logits)
    assert torch.equal(model(**batch).logits, model(**batch, task_ids=0).logits)


def test_task_names_may_collide_with_attributes_of_modules(toys: SimpleNamespace) -> None:
    specs = [TaskSpec(name, "classification", ("s",), ("a", "b"), ("accuracy",)) for name in ("type", "train", "a-b")]
    model = toys.make_model("encoder", specs)
    assert list(model.heads.by_task) == ["head_type", "head_train", "head_a-b"]


def test_bad_tasks_and_ids_are_named(toys: SimpleNamespace, tasks: list[TaskData], choice_task: TaskData) -> None:
    base = toys.make_base("encoder")
    regression = TaskSpec("free", "regression", ("s",), None, ("pearson",))
    for specs, message in (
        ([], "at least one task"),
        ([tasks[0].spec, tasks[0].spec], "each name once"),
        ([choice_task.spec], "'choice' is multiple choice"),
        ([regression], "'free' has no label_range"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiTaskEncoder(base, specs)
    model = toys.make_model("encoder", [task.spec for task in tasks])
    batch = _batch(toys, tasks)
    ids = batch.pop("task_ids")
    with pytest.raises(ValueError, match="task_ids is missing: there are 3 tasks"):
        model(**batch)
    with pytest.raises(ValueError, match=r"task_ids has shape \[11\]"):
        model(**batch, task_ids=ids[1:])


def test_logits_do_not_depend_on_how_many_heads_there_are(tasks: list[TaskData]) -> None:
    """A head that comes later must not change a bit of the others' logits: one product for all heads would."""
    torch.manual_seed(0)
    pooled = torch.randn(64, 384)
    for first, later in ((1, 0), (2, 1), (0, 1)):
        for batch in (1, 2, 3, 64):
            heads, ids = TaskHeads(384, [tasks[first].spec]), torch.zeros(batch, dtype=torch.long)
            before = heads(pooled[:batch], ids)
            heads.add(tasks[later].spec, trains=True)
            assert torch.equal(before, heads(pooled[:batch], ids)[:, : before.shape[1]])
