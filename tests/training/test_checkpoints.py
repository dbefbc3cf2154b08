"""Checkpoint folders: complete or not taken for one, rotated, resumed from, to the bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from ept import models, train
from ept.data import TaskData
from ept.files import WriteError, clear_leftovers, write_atomically
from ept.training import EPTTrainer, newest_checkpoint
from ept.training.checkpointing import MANIFEST, UNFINISHED, finish_checkpoint, remove_checkpoint, rotate_checkpoints
from ept.training.options import SYSTEMS

METHODS = ["ept", "tucka"]


@pytest.fixture
def make(toys: SimpleNamespace, tmp_path: Path) -> Callable[..., EPTTrainer]:
    """Makes a trainer of an encoder on two tasks, 42 rows: six batches of seven are an epoch."""
    tasks = [toys.make_task(toys.specs[0], 20, 6), toys.make_task(toys.specs[1], 22, 6)]

    def make(method: str = "ept", *, tasks: list[TaskData] = tasks, **options: Any) -> EPTTrainer:
        specs = [task.spec for task in tasks]
        model = toys.make_model("encoder", specs)
        torch.manual_seed(1)
        shared = {"target_modules": models.target_modules(model), "modules_to_save": ["heads"], "lora_dropout": 0.1}
        more = {"r": 2, "kernel_sizes": (1, 2, 2), "auto_routing": True} if method == "ept" else {"r": 4}
        config = SYSTEMS[method].make_config([spec.name for spec in specs], **shared, **more)
        defaults = {
            "max_steps": 9,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 7,
            "logging_steps": 10,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        args = toys.quiet_arguments(tmp_path / "checkpoints", **defaults | options)
        model = get_peft_model(model, config)
        return EPTTrainer(model, args, tasks=tasks, processing_class=toys.make_tokenizer("encoder"))

    return make


def same(first: PeftModel, second: PeftModel) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("batching", ["mixed", "single"])
@pytest.mark.parametrize("method", METHODS)
def test_resuming_from_any_checkpoint_ends_at_the_same_adapter(
    make: Callable, tmp_path: Path, method: str, batching: str
) -> None:
    """Mid-epoch (1, 4, 8), at an epoch's end (6), and where nothing is left to do (9); with accumulated gradients."""
    straight = make(method, task_batching=batching)
    straight.train()
    assert names(tmp_path / "checkpoints") == sorted(f"checkpoint-{step}" for step in range(1, 10))
    for step in (1, 4, 6, 8, 9):
        resumed = make(method, task_batching=batching, output_dir=str(tmp_path / f"from{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 9
        assert same(straight.model, resumed.model), step


def test_resuming_with_accumulated_gradients(make: Callable, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 4, "max_steps": 5}  # two steps an epoch, the second of two batches
    straight = make(**options)
    straight.train()
    for step in (1, 3, 4):
        resumed = make(**options, output_dir=str(tmp_path / f"from{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{step}"))
        assert same(straight.model, resumed.model), step


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_resumes_to_the_bit(command: Callable, tmp_path: Path, method: str) -> None:
    options = {"method": method, "lr": None, "max_steps": 5, "save_steps": 2, "eval_limit": 2}
    if method == "tucka":
        options["kernel_sizes"] = None
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train.main(command(straight, **options)) == 0
    assert names(straight / "checkpoints") == ["checkpoint-4", "checkpoint-5"]
    resumed.mkdir()
    shutil.copy(straight / "settings.json", resumed)
    shutil.copytree(straight / "checkpoints" / "checkpoint-4", resumed / "checkpoints" / "checkpoint-4")
    assert train.main(command(resumed, "--resume", **options)) == 0
    wanted, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight, resumed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_the_best_checkpoint_survives_rotation_under_its_own_name(make: Callable, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 6}
    trainer = make(**options, save_total_limit=2, greater_is_better=False, learning_rate=3e-2)
    trainer.train()
    folder, best = tmp_path / "checkpoints", Path(trainer.state.best_model_checkpoint)
    means = [entry["eval_mean"] for entry in trainer.state.log_history if "eval_mean" in entry]
    assert best == folder / f"checkpoint-{1 + means.index(min(means))}"
    assert best.is_dir()
    assert names(folder) == sorted({best.name if best.name != "checkpoint-6" else "checkpoint-5", "checkpoint-6"})
    assert trainer.evaluate()["eval_mean"] == min(means)


def written(folder: Path, step: int, size: int = 3) -> Path:
    """A finished checkpoint of two files."""
    path = folder / UNFINISHED / f"checkpoint-{step}"
    (path / "below").mkdir(parents=True)
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    (path / "below" / "weights").write_bytes(b"w" * size)
    finish_checkpoint(path, folder / path.name)
    return folder / path.name


def test_an_incomplete_checkpoint_is_not_taken(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    first, *broken = (written(tmp_path, step) for step in (5, 10, 20, 30, 40, 50, 60))
    assert newest_checkpoint(tmp_path) == broken[-1]
    (broken[0] / "below" / "weights").unlink()
    (broken[1] / "below" / "weights").write_bytes(b"w")
    (broken[2] / MANIFEST).unlink()
    (broken[3] / MANIFEST).write_text('{"sha256": {"weig')
    (broken[4] / MANIFEST).write_text("[1]")
    (broken[5] / "below" / "weights").write_bytes(b"w\0w")  # as long as it was
    (tmp_path / UNFINISHED / "checkpoint-70").mkdir()
    (tmp_path / "checkpoint-80").write_text("")
    (tmp_path / "checkpoint-last").mkdir()
    assert newest_checkpoint(tmp_path) == first


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    for size in (3, 5):
        path = written(tmp_path, 7, size)
    assert (path / "below" / "weights").stat().st_size == 5
    assert newest_checkpoint(tmp_path) == path


def test_rotation_and_removal_leave_no_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 10, 20):
        written(tmp_path, step)
    rotate_checkpoints(tmp_path, None, set())
    rotate_checkpoints(tmp_path, 3, {tmp_path / "checkpoint-1"})
    assert names(tmp_path) == [UNFINISHED, "checkpoint-1", "checkpoint-10", "checkpoint-20"]

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(tmp_path / "checkpoint-1")
    assert names(tmp_path) == [UNFINISHED, "checkpoint-10", "checkpoint-20"]


def test_training_clears_what_killed_runs_left(make: Callable, tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / UNFINISHED / "checkpoint-3"
    left.mkdir(parents=True)
    (left / "optimizer.pt").write_bytes(b"half")
    trainer = make(max_steps=1)
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    assert not left.exists()


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    (tmp_path / ".adapter.12.tmp").mkdir()
    (tmp_path / ".metrics.12.tmp.json").write_text("{")
    for name in ("adapter", "pictures"):
        (tmp_path / f".{name}.12.old").mkdir()
        (tmp_path / f".{name}.12.old" / "file").write_text("before")
    (tmp_path / "pictures").mkdir()
    (tmp_path / ".hidden.tmp").write_text("not ours")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden.tmp", "adapter", "pictures"]
    assert (tmp_path / "adapter" / "file").read_text() == "before"
    assert names(tmp_path / "pictures") == []
    clear_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("when", ["writing", "syncing", "moving"])
def test_a_failed_write_names_the_path_and_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("after")
        if when == "writing":
            full()

    if when == "syncing":
        monkeypatch.setattr(os, "fsync", full)
    if when == "moving":
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: full() if str(a).endswith(".tmp") else replace(a, b))
    with pytest.raises(WriteError, match=rf"cannot write '{target}': \[Errno 28\] No space left") as caught:
        write_atomically(target, write)
    assert caught.value.errno == 28
    assert names(tmp_path) == ["out"]
    assert (target / "file").read_text() == "before"
