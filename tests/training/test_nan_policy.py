"""Steps that are not finite: stopped at or skipped, explained, never applied and never saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

import ept
from ept import models, train
from ept.config import AdapterConfig
from ept.data import TaskData
from ept.training import EPTTrainer, EPTTrainingArguments, newest_checkpoint
from ept.training.finite import refuse_nonfinite
from ept.tuner.layer import EPTLinearLayer

LAYER = "encoder.encoder.layer.1.attention.output.dense"


@pytest.fixture
def make(toys: SimpleNamespace, tasks: list[TaskData], tmp_path: Path) -> Callable[..., EPTTrainer]:
    """Makes a trainer of six steps of eight rows of three tasks; ``lora`` for PEFT's LoRA."""

    def make(
        *,
        lora: bool = False,
        config: AdapterConfig | None = None,
        tasks: list[TaskData] = tasks,
        callbacks: list | None = None,
        **options: Any,
    ) -> EPTTrainer:
        specs = [task.spec for task in tasks]
        model = toys.make_model("encoder", specs)
        torch.manual_seed(1)
        shared = {"target_modules": models.target_modules(model), "modules_to_save": ["heads"], "r": 2}
        if lora:
            config = LoraConfig(**shared)
        elif config is None:
            config = ept.EPTConfig(kernel_sizes=(1, 2, 2), task_names=[spec.name for spec in specs], **shared)
        args = toys.quiet_arguments(tmp_path / "checkpoints", **{"save_strategy": "steps", "save_steps": 2} | options)
        return EPTTrainer(
            get_peft_model(model, config),
            args,
            tasks=tasks,
            processing_class=toys.make_tokenizer("encoder"),
            callbacks=callbacks,
        )

    return make


class Poison:
    """Makes a layer's output, or its gradient, NaN in one step for the samples of one task (None: for all)."""

    def __init__(
        self, trainer: EPTTrainer, step: int, task: int | None, *, layer: str = LAYER, backward: bool = False
    ) -> None:
        self.trainer, self.step, self.task, self.backward = trainer, step, task, backward
        trainer.model.register_forward_pre_hook(self.remember, with_kwargs=True)
        trainer.model.get_submodule(f"base_model.model.{layer}").register_forward_hook(self.spoil)

    def remember(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.ids = kwargs["task_ids"]

    def spoil(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self.trainer.state.global_step != self.step - 1 or not self.trainer.is_in_train:
            return None
        rows = torch.ones_like(self.ids, dtype=torch.bool) if self.task is None else self.ids == self.task
        mask = rows[:, None, None].expand_as(output)
        if self.backward:
            if output.requires_grad:
                output.register_hook(lambda grad: grad.masked_fill(mask, float("nan")))
            return None
        return output.masked_fill(mask, float("nan"))


class Parameters(TrainerCallback):
    """Keeps the trained parameters as they are after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.after.append({name: p.detach().clone() for name, p in named if p.requires_grad})


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("task", "backward", "message"),
    [
        (
            1,
            False,
            rf"step 4: the loss is not finite; first such value: the output of {LAYER} \(its input is finite\); "
            "tasks of the batch: topic. Nothing of this step was applied or saved",
        ),
        (None, False, f"the output of {LAYER} .*; tasks of the batch: polarity, topic, degree"),
        (1, True, "step 4: the gradient is not finite; first such value: the gradient of .*layer.*; tasks of"),
    ],
)
def test_training_stops_before_a_step_that_is_not_finite(
    make: Callable, tmp_path: Path, task: int | None, backward: bool, message: str
) -> None:
    kept = Parameters()
    trainer = make(callbacks=[kept])
    Poison(trainer, 4, task, backward=backward)
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert len(kept.after) == 3
    assert same(kept.after[2], dict(trainer.model.named_parameters()))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    assert not trainer.args.logging_nan_inf_filter


def test_a_run_that_stopped_is_resumed_without_the_step(make: Callable, tmp_path: Path) -> None:
    stopped = make()
    Poison(stopped, 4, 1)
    with pytest.raises(FloatingPointError):
        stopped.train()
    finals = []
    for resume in (True, None):
        if resume is None:
            tmp_path = tmp_path / "straight"
        trainer = make(nan_policy="skip", output_dir=str(tmp_path / "checkpoints"))
        Poison(trainer, 4, 1)
        trainer.train(resume_from_checkpoint=resume)
        finals.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    assert same(*finals)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_skipped_step_changes_nothing(
    make: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, accumulated: int, backward: bool
) -> None:
    kept = Parameters()
    trainer = make(
        callbacks=[kept],
        nan_policy="skip",
        gradient_accumulation_steps=accumulated,
        logging_steps=2,
        num_train_epochs=1,
    )
    Poison(trainer, 4, 2, backward=backward)
    with caplog.at_level(logging.WARNING, "ept.training.finite"):
        trainer.train()
    assert trainer.state.global_step == len(kept.after) == 6
    assert [same(a, b) for a, b in zip(kept.after, kept.after[1:], strict=False)] == [False, False, True, False, False]
    states = trainer.optimizer.state_dict()["state"].values()
    assert max(int(state["step"]) for state in states) == 5
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in entries] == [None, None, 1, None]
    assert all(torch.isfinite(torch.tensor(entry["task_loss"])) for entry in entries)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in entries)
    (record,) = caplog.records
    assert record.getMessage().startswith("step 4: the ")
    assert record.getMessage().endswith("; the step is left out")
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-6"


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            lambda **shared: ept.EPTConfig(kernel_sizes=(1, 2, 2), auto_routing=True, **shared), id="ept, auto_routing"
        ),
        pytest.param(lambda **shared: ept.TuckAConfig(**shared), id="tucka"),
    ],
)
def test_what_a_skipped_step_saw_leaves_no_trace_in_the_adapter(
    make: Callable, tasks: list[TaskData], tmp_path: Path, config: Callable[..., AdapterConfig], step: int
) -> None:
    """Statistics of the input (prototypes, first centroids) are taken before the loss of the pass is judged."""
    names = [task.spec.name for task in tasks]
    adapter = config(task_names=names, target_modules=["query", "dense"], modules_to_save=["heads"], r=2)
    trainer = make(config=adapter, nan_policy="skip", num_train_epochs=1)
    Poison(trainer, step, None, layer="encoder.embeddings.word_embeddings")
    trainer.train()
    assert trainer.state.global_step == 6
    saved = load_file(newest_checkpoint(tmp_path / "checkpoints") / "adapter_model.safetensors")
    statistics = [name for name in saved if "prototypes.mean" in name or "centroids" in name]
    assert statistics
    assert all(saved[name].abs().sum() > 0 for name in statistics)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_a_statistic_that_is_not_finite_is_not_saved(make: Callable, tasks: list[TaskData]) -> None:
    names = [task.spec.name for task in tasks]
    trainer = make(
        config=ept.EPTConfig(task_names=names, target_modules=["query"], auto_routing=True, kernel_sizes=(1, 2))
    )
    trainer.model.base_model.ept_task_tables["default"].prototypes.mean[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"prototypes\.mean is not finite; nothing was saved"):
        refuse_nonfinite(trainer.model)


def test_a_skipped_step_leaves_no_trace_in_the_next(make: Callable) -> None:
    """Explaining computes the step again; neither statistics nor random numbers may notice."""
    finals = []
    for explains in (True, False):
        trainer = make(nan_policy="skip")
        if not explains:
            trainer._finite_steps._search = lambda batches: None
        Poison(trainer, 2, 0)
        trainer.train()
        finals.append(trainer.model.state_dict())
    assert same(*finals)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_broken_weight_stops_every_policy_and_is_not_saved(make: Callable, tmp_path: Path, policy: str) -> None:
    class Break(TrainerCallback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step - 1:
                layers = [m for m in kwargs["model"].modules() if isinstance(m, EPTLinearLayer)]
                layers[3].ept_adapters["default"].A.data[0, 0] = float("inf")

    with pytest.raises(FloatingPointError, match=r"the weight \S+\.A is not finite; nothing was saved"):
        make(nan_policy=policy, callbacks=[Break(4)]).train()
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    assert not (tmp_path / "checkpoints" / "checkpoint-4").exists()
    with pytest.raises(FloatingPointError, match=r"step 6: .*first such value: the weight \S+\.A; tasks of"):
        make(nan_policy=policy, callbacks=[Break(5)]).train()


def test_a_label_that_is_no_number_is_named(make: Callable, tasks: list[TaskData]) -> None:
    degree = tasks[2]
    rows = degree.train.to_dict()
    rows["label"] = [float("nan")] * len(rows["label"])
    broken = TaskData(degree.spec, Dataset.from_dict(rows), degree.validation)
    with pytest.raises(FloatingPointError, match="first such value: the batch's labels; tasks of the batch: degree"):
        make(tasks=[*tasks[:2], broken]).train()


def test_a_plain_lora_is_watched_too(make: Callable) -> None:
    trainer = make(lora=True)
    layer = trainer.model.get_submodule(f"base_model.model.{LAYER}")
    layer.register_forward_hook(lambda *_: torch.full_like(_[2], float("inf")) if trainer.is_in_train else None)
    with pytest.raises(FloatingPointError, match=f"step 1: .*the output of {LAYER} "):
        trainer.train()


def test_the_command_line_ends_with_the_reason(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute_loss = EPTTrainer.compute_loss

    def spoiled(self: EPTTrainer, model: torch.nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            for name, parameter in self.model.named_parameters():
                if name.endswith("kernels.0"):
                    parameter.data.fill_(float("nan"))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EPTTrainer, "compute_loss", spoiled)
    with pytest.raises(SystemExit) as stop:
        train.main(command(tmp_path / "run"))
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "ept-train: error: step 4: the loss is not finite; first such value: the weight " in shown
    assert not (tmp_path / "run" / "adapter").exists()
    monkeypatch.undo()
    assert train.main(command(tmp_path / "run", "--resume", nan_policy="skip")) == 0


def test_a_policy_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan_policy must be one of stop, skip, got 'hope'"):
        EPTTrainingArguments(output_dir=str(tmp_path), nan_policy="hope")
