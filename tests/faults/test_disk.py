"""A disk that is full or cannot be written to: an error that names the path, and what was there before intact."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from faults.runs import UNAVAILABLE, Conditions, make_context, run
from safetensors.torch import load_file

import ept
from ept import models, train
from ept.data import TaskData
from ept.files import WriteError
from ept.training import newest_checkpoint, save_trained

OPTIONS = {"max_steps": 4, "save_steps": 1, "eval_limit": 2}


def content(folder: Path) -> dict[str, str]:
    """A digest of every file below, but of the settings, which say whether a run is resumed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "settings.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, command: Callable) -> Path:
    """The output of an uninterrupted run of four steps."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(command(output, **OPTIONS)) == 0
    return output


def limited(
    finished: Path, command: Callable, tmp_path: Path, limit: int, flag: str, **options: Any
) -> tuple[Path, dict[str, str], str]:
    """A run over a copy of ``finished`` that may write no file of more than ``limit`` bytes, which it must need.

    Returns the output folder, what was in it before, and what the run said.
    """
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    if flag == "--resume":
        shutil.rmtree(output / "checkpoints" / "checkpoint-4")
    before = content(output)
    arguments = command(output, flag, **{**OPTIONS, **options})
    code, shown = run(make_context(), arguments, tmp_path / "log", Conditions(file_bytes=limit))
    assert code == 1, shown
    assert [path.name for path in (*output.glob(".*"), *output.glob("checkpoints/_*"))] == []
    return output, before, shown


def test_a_checkpoint_without_room_leaves_the_earlier_one(finished: Path, command: Callable, tmp_path: Path) -> None:
    output, before, shown = limited(finished, command, tmp_path, 60_000, "--resume")
    path = output / "checkpoints" / "checkpoint-4"
    assert f"ept-train: error: cannot write '{path}': " in shown
    assert content(output) == before
    assert newest_checkpoint(path.parent) == path.with_name("checkpoint-3")
    code, shown = run(make_context(), command(output, "--resume", **OPTIONS), tmp_path / "log")
    assert code == 0, shown
    wanted, found = adapter(finished), adapter(output)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize(("limit", "failing", "replaced"), [(16_000, "adapter", []), (45_000, "pictures", ["adapter"])])
def test_an_output_without_room_leaves_the_earlier_one(
    finished: Path, command: Callable, tmp_path: Path, limit: int, failing: str, replaced: list[str]
) -> None:
    output, before, shown = limited(finished, command, tmp_path, limit, "--overwrite", save_steps=0, seed=1)
    assert f"ept-train: error: cannot write '{output / failing}': " in shown
    after = content(output)
    for folder in ("adapter", "pictures"):
        old, new = ({n: d for n, d in files.items() if n.startswith(folder)} for files in (before, after))
        assert old.keys() == new.keys()
        assert (old != new) == (folder in replaced)


def test_a_full_disk_ends_a_run_with_the_path(command: Callable, tmp_path: Path) -> None:
    """On a real file system that is too small: the third checkpoint finds no room beside two others."""
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments, conditions = command(disk / "run", **OPTIONS), Conditions(disk=(disk, 350_000))
    code, shown = run(make_context(), arguments, tmp_path / "log", conditions)
    if code == UNAVAILABLE:
        pytest.skip(f"no private mounts here: {shown.strip()}")
    assert code == 1, shown
    assert f"cannot write '{disk}/run/checkpoints/checkpoint-3': " in shown
    assert "No space left on device" in shown or "file write failed" in shown
    assert list(disk.iterdir()) == []  # it was full for that process alone


def test_a_read_only_folder_is_named_before_any_work(command: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "run").mkdir(parents=True)
    conditions = Conditions(read_only=folder)
    if os.geteuid() != 0:
        (folder / "run").chmod(0o555)
        conditions = Conditions()
    code, shown = run(make_context(), command(folder / "run"), tmp_path / "log", conditions)
    if code == UNAVAILABLE:
        pytest.skip(f"root may write everywhere, and no private mounts here: {shown.strip()}")
    assert code == 2, shown
    assert f"argument --output: '{folder}/run' cannot be written to" in shown


def test_a_file_in_place_of_the_checkpoint_folder_is_named(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    code, shown = run(make_context(), command(tmp_path / "run", "--overwrite", max_steps=1), tmp_path / "log")
    assert code != 0
    assert f"'{tmp_path}/run/checkpoints'" in shown


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every safetensors file ends as on a full disk: half of it is written, then the library's own error."""
    from safetensors import SafetensorError

    def half(tensors: Any, filename: Any, *_: Any, **__: Any) -> None:
        Path(filename).write_bytes(b"\x08half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.serialize_file", half)
        yield


@pytest.fixture
def adapted(toys: SimpleNamespace, tasks: list[TaskData]) -> peft.PeftModel:
    specs = [task.spec for task in tasks]
    model = toys.make_model("encoder", specs)
    options = {"target_modules": models.target_modules(model), "modules_to_save": ["heads"]}
    config = ept.EPTConfig(r=2, kernel_sizes=(1, 2, 2), task_names=[spec.name for spec in specs], **options)
    return peft.get_peft_model(model, config).eval()


WRITERS = {
    "save_trained": lambda model, toys, specs, folder: save_trained(
        folder.parent, model, toys.make_tokenizer("encoder"), specs, base_model="base"
    ),
    "export_merged": lambda model, toys, specs, folder: ept.export_merged(model, 1, folder, overwrite=True),
    "export_lora": lambda model, toys, specs, folder: ept.export_lora(model, 1, folder, overwrite=True),
    "export_deltas": lambda model, toys, specs, folder: ept.export_deltas(model, folder, overwrite=True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_leaves_a_model_is_whole_or_not_there(
    monkeypatch: pytest.MonkeyPatch,
    adapted: peft.PeftModel,
    toys: SimpleNamespace,
    tasks: list[TaskData],
    tmp_path: Path,
    writer: str,
) -> None:
    folder, specs = tmp_path / "adapter", [task.spec for task in tasks]

    def write() -> None:
        WRITERS[writer](adapted, toys, specs, folder)

    with no_room(monkeypatch), pytest.raises(WriteError, match=rf"cannot write '{folder}': .*No space left on device"):
        write()
    assert list(tmp_path.iterdir()) == []
    write()
    before = content(folder)
    assert any(name.endswith(".safetensors") for name in before)
    with no_room(monkeypatch), pytest.raises(WriteError, match="No space left on device"):
        write()
    assert list(tmp_path.iterdir()) == [folder]
    assert content(folder) == before


def test_pefts_own_save_is_in_place_but_no_half_of_it_loads(
    monkeypatch: pytest.MonkeyPatch,
    adapted: peft.PeftModel,
    toys: SimpleNamespace,
    tasks: list[TaskData],
    tmp_path: Path,
) -> None:
    with no_room(monkeypatch), pytest.raises(Exception, match="No space left on device"):
        adapted.save_pretrained(tmp_path)
    base = toys.make_model("encoder", [task.spec for task in tasks])
    with pytest.raises(Exception, match=r"adapter_config\.json|deserializing header|config"):
        peft.PeftModel.from_pretrained(base, tmp_path)
