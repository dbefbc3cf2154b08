"""Training, evaluation and resuming, on random models of all three kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

import ept
from ept import models
from ept.data import TaskData
from ept.training import EPTTrainer, EPTTrainingArguments, baselines, evaluate_tasks
from ept.training.run import TASK_TYPES
from ept.training.trainer import SamplerEpoch

KINDS = ["encoder", "seq2seq", "causal"]


@pytest.fixture(scope="module")
def small_tasks(toys: SimpleNamespace, tasks: list[TaskData]) -> list[TaskData]:
    """Three tasks with 42 train rows in total: six batches of 8 are an epoch."""
    return [toys.make_task(task.spec, rows, 8) for task, rows in zip(tasks, (10, 20, 12), strict=True)]


@pytest.fixture
def adapted(toys: SimpleNamespace) -> Callable[..., PeftModel]:
    """Makes a random model of a kind with an EPT adapter (or a plain LoRA) on its blocks, the same one every time."""

    def make(kind: str, tasks: list[TaskData], *, lora: bool = False, **options: object) -> PeftModel:
        specs = [task.spec for task in tasks]
        model = toys.make_model(kind, specs)
        torch.manual_seed(1)
        shared = {
            "target_modules": models.target_modules(model),
            "modules_to_save": ["heads"] if kind == "encoder" else None,
            "task_type": TASK_TYPES[kind],
        }
        if lora:
            return get_peft_model(model, LoraConfig(r=2, **shared))
        names = [spec.name for spec in specs]
        return get_peft_model(
            model, ept.EPTConfig(**{"r": 2, "kernel_sizes": (1, 2, 2), "task_names": names} | shared | options)
        )

    return make


@pytest.fixture
def trainer(toys: SimpleNamespace, tmp_path: Path) -> Callable[..., EPTTrainer]:
    """Makes a quiet trainer of 10 steps on the CPU."""

    def make(
        model: PeftModel, kind: str, tasks: list[TaskData], callbacks: list | None = None, **options: object
    ) -> EPTTrainer:
        args = toys.quiet_arguments(tmp_path / "checkpoints", **{"max_steps": 10} | options)
        return EPTTrainer(model, args, tasks=tasks, processing_class=toys.make_tokenizer(kind), callbacks=callbacks)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_total_loss_is_task_loss_plus_weighted_contrastive_loss(
    adapted: Callable, trainer: Callable, small_tasks: list[TaskData], kind: str
) -> None:
    run = trainer(adapted(kind, small_tasks, contrastive_weight=0.3), kind, small_tasks, logging_steps=2)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 4, 6, 8, 10]
    for entry in entries:
        total = entry["task_loss"] + 0.3 * entry["contrastive_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["contrastive_loss"] > 0
    assert entries[-1]["task_loss"] < entries[0]["task_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_scores_every_task(
    adapted: Callable, trainer: Callable, toys: SimpleNamespace, small_tasks: list[TaskData], kind: str
) -> None:
    model = adapted(kind, small_tasks)
    run = trainer(model, kind, small_tasks)
    found = run.evaluate()
    expected = evaluate_tasks(model, toys.make_tokenizer(kind), small_tasks, max_new_tokens=3)
    for task in small_tasks:
        name = task.spec.name
        assert set(expected[name]) == {*task.spec.metrics, *(["unparseable"] if kind != "encoder" else [])}
        for metric, value in expected[name].items():
            assert found[f"eval_{name}_{metric}"] == pytest.approx(value), metric
    headlines = [expected[task.spec.name][task.spec.metrics[0]] for task in small_tasks]
    assert found["eval_mean"] == pytest.approx(sum(headlines) / 3)
    assert run.state.log_history[-1]["eval_mean"] == found["eval_mean"]
    assert ("eval_topic_loss" in found) == (kind == "encoder")
    assert list(run.evaluate_by_task(["topic"])) == ["topic"]
    with pytest.raises(ValueError, match="nothing"):
        run.evaluate(["nothing"])


def test_answers_that_name_no_label_are_counted_as_wrong(
    adapted: Callable, toys: SimpleNamespace, small_tasks: list[TaskData]
) -> None:
    model = adapted("seq2seq", small_tasks)
    with torch.no_grad():
        model.get_base_model().lm_head.weight.zero_()  # greedy generation of nothing but padding
    found = evaluate_tasks(model, toys.make_tokenizer("seq2seq"), small_tasks, max_new_tokens=2)
    assert [found[name]["unparseable"] for name in ("polarity", "topic", "degree")] == [8, 8, 8]
    assert found["polarity"]["accuracy"] == found["topic"]["accuracy"] == found["degree"]["pearson"] == 0


@pytest.mark.parametrize(("kind", "stop"), [("encoder", 6), *((kind, 4) for kind in KINDS)])  # 6: an epoch's end
def test_resumed_training_equals_uninterrupted_training_to_the_bit(
    adapted: Callable, trainer: Callable, small_tasks: list[TaskData], kind: str, stop: int
) -> None:
    options = {"save_strategy": "steps", "save_steps": stop, "max_steps": 8}
    straight = adapted(kind, small_tasks, lora_dropout=0.1).train()
    run = trainer(straight, kind, small_tasks, **options)
    run.train()
    resumed = adapted(kind, small_tasks, lora_dropout=0.1)
    again = trainer(resumed, kind, small_tasks, **options)
    again.train(resume_from_checkpoint=str(Path(run.args.output_dir) / f"checkpoint-{stop}"))
    assert again.state.global_step == 8
    wanted, found = straight.state_dict(), resumed.state_dict()
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    losses = [[e["loss"] for e in r.state.log_history if "loss" in e] for r in (run, again)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_lora_trains_too(adapted: Callable, trainer: Callable, small_tasks: list[TaskData], kind: str) -> None:
    model = adapted(kind, small_tasks, lora=True)
    run = trainer(model, kind, small_tasks)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert all("contrastive_loss" not in entry for entry in entries)
    assert entries[-1]["task_loss"] < entries[0]["task_loss"]
    assert "eval_mean" in run.evaluate()


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_equal_those_of_the_whole_batch(
    adapted: Callable, trainer: Callable, small_tasks: list[TaskData], kind: str
) -> None:
    gradients, losses = [], []

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
            gradients.append({n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None})

    for batch, steps in ((14, 1), (7, 2)):  # both divide an epoch's 42 samples, so the order is the same
        # A decoder's part of the contrastive loss counts padding, and the halves do not have as much of it.
        model = adapted(kind, small_tasks, contrastive_weight=0.0 if kind == "seq2seq" else 0.1)
        for module in model.modules():
            for name in ("p", "dropout_prob", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        run = trainer(model, kind, small_tasks, [Catch()], max_grad_norm=0.0, **options)
        run.train()
        losses.append(
            {name: run.state.log_history[0].get(name, 0.0) for name in ("loss", "task_loss", "contrastive_loss")}
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    whole, halves = (torch.cat([g.flatten() for g in found.values()]) for found in gradients)
    assert (halves - whole).norm() < 1e-4 * whole.norm()


def test_kernels_and_gates_have_their_own_learning_rates(
    adapted: Callable, trainer: Callable, small_tasks: list[TaskData]
) -> None:
    model = adapted("encoder", small_tasks)
    run = trainer(model, "encoder", small_tasks, kernel_lr_ratio=7.0, gate_lr_ratio=4.0, learning_rate=1e-3)
    groups = run.create_optimizer().param_groups
    kernels = {id(p) for name, p in model.named_parameters() if ".kernels." in name}
    gates = {id(p): p.shape[1] for name, p in model.named_parameters() if name.endswith(".gate")}
    (width,) = set(gates.values())
    assert groups[0]["lr"] == 1e-3  # the rate that the log shows
    for group in groups:
        members = {id(p) for p in group["params"]}
        ratio = 7.0 if members == kernels else 4.0 / width if members == set(gates) else 1.0
        assert group["lr"] == pytest.approx(ratio * 1e-3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups for p in group["params"]) == trained


def test_best_model_is_chosen_by_the_mean_over_tasks(
    adapted: Callable, trainer: Callable, small_tasks: list[TaskData]
) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    run = trainer(adapted("encoder", small_tasks), "encoder", small_tasks, load_best_model_at_end=True, **steps)
    run.train()
    means = [entry["eval_mean"] for entry in run.state.log_history if "eval_mean" in entry]
    assert run.state.best_metric == max(means)
    assert run.evaluate()["eval_mean"] == pytest.approx(max(means))


def test_single_task_batches(adapted: Callable, trainer: Callable, small_tasks: list[TaskData]) -> None:
    run = trainer(adapted("encoder", small_tasks), "encoder", small_tasks, task_batching="single")
    assert {len(set(batch["task_ids"].tolist())) for batch in run.get_train_dataloader()} == {1}


def test_tasks_keep_the_ids_that_the_model_gives_them(
    adapted: Callable, trainer: Callable, small_tasks: list[TaskData], choice_task: TaskData
) -> None:
    run = trainer(adapted("causal", small_tasks), "causal", [small_tasks[2], small_tasks[0]])
    assert {run.train_dataset[i]["task_id"] for i in range(22)} == {2, 0}
    assert run.train_dataset[0]["task_id"] == 2
    with pytest.raises(ValueError, match="the model has no task 'choice'; it has: polarity, topic, degree"):
        trainer(adapted("causal", small_tasks), "causal", [choice_task])
    disagreeing = adapted("encoder", small_tasks, task_names=["topic", "polarity", "degree"])
    with pytest.raises(ValueError, match="task_names of the adapter are"):
        trainer(disagreeing, "encoder", small_tasks)


def test_an_encoder_without_heads_is_refused(
    trainer: Callable, toys: SimpleNamespace, small_tasks: list[TaskData]
) -> None:
    with pytest.raises(TypeError, match="wrap an encoder in MultiTaskEncoder"):
        trainer(toys.make_base("encoder"), "encoder", small_tasks)


def test_multiple_choice_by_generation(
    adapted: Callable, trainer: Callable, toys: SimpleNamespace, choice_task: TaskData
) -> None:
    task = toys.make_task(choice_task.spec, 10, 6)
    run = trainer(adapted("seq2seq", [task]), "seq2seq", [task], max_steps=2)
    run.train()
    assert 0 <= run.evaluate()["eval_choice_accuracy"] <= 1


def test_eval_limit_scores_the_same_rows_every_time(
    adapted: Callable, trainer: Callable, tasks: list[TaskData]
) -> None:
    run = trainer(adapted("encoder", tasks), "encoder", tasks, eval_limit=7)
    assert [len(rows) for rows in run.eval_dataset.values()] == [7, 7, 7]
    texts = [run.eval_dataset["topic"][i]["text"] for i in range(7)]
    assert [len(text) for text in texts] != sorted(map(len, tasks[1].validation["text"]))[:7]
    again = trainer(adapted("encoder", tasks), "encoder", tasks, eval_limit=7)
    assert texts == [again.eval_dataset["topic"][i]["text"] for i in range(7)]


def test_baselines_know_only_the_labels(tasks: list[TaskData]) -> None:
    found = baselines(tasks)
    labels = tasks[1].validation["label"]
    majority = max(range(3), key=list(tasks[1].train["label"]).count)
    assert found["topic"]["accuracy"] == pytest.approx(list(labels).count(majority) / len(labels))
    assert found["degree"] == {"pearson": 0.0, "spearman": 0.0}


def test_the_sampler_is_told_its_epoch() -> None:
    callback = SamplerEpoch()
    epochs = []
    callback.sampler = SimpleNamespace(set_epoch=epochs.append)
    for epoch in (None, 0, 0.9999999, 1.0, 2.5):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert epochs == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_batching": "both"}, "task_batching must be one of mixed, single, got 'both'"),
        ({"kernel_lr_ratio": 0}, "kernel_lr_ratio must be a number > 0, got 0"),
        ({"max_length": 4}, "max_length must be at least 8, got 4"),
        ({"eval_limit": 0}, "eval_limit must be at least 1, got 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_bad_training_arguments_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPTTrainingArguments(output_dir=str(tmp_path), **options)
