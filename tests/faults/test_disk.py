"""A disk that is full or cannot be written to: an error that names the path, and what was there before intact."""

from __future__ import annotations

import hashlib
import os
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


def content(folder: Path) -> dict[str, str]:
    """A digest of every file below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, command: Callable) -> Path:
    """The output of an uninterrupted run of four steps."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(command(output, max_steps=4, save_steps=1, eval_limit=2)) == 0
    return output


@pytest.mark.parametrize("limit", [200, 10_000, 16_000, 60_000])
def test_a_file_that_cannot_grow_fails_as_a_full_disk_does(
    finished: Path, command: Callable, tmp_path: Path, limit: int
) -> None:
    """The limits stop, in this order, the settings, the adapter's tensors or the optimizer's, and a picture."""
    options = {"max_steps": 4, "save_steps": 1, "eval_limit": 2}
    context, log, output = make_context(), tmp_path / "log", tmp_path / "run"
    code, shown = run(context, command(output, **{**options, "max_steps": 2}), log)
    assert code == 0, shown
    before = content(output)
    code, shown = run(context, command(output, "--overwrite", **options), log, Conditions(file_bytes=limit))
    assert code == 1, shown
    assert "ept-train: error: cannot write '" in shown
    assert f"{output}/" in shown
    after = content(output)
    assert [name for name in after if name.startswith((".", "checkpoints/_"))] == []
    assert {name for name in after if name.startswith(("adapter/", "metrics"))} == {
        name for name in before if name.startswith(("adapter/", "metrics"))
    }
    if limit < 60_000:
        assert all(after[name] == digest for name, digest in before.items() if name.startswith(("adapter/", "metrics")))
    resumed = "--resume" if newest_checkpoint(output / "checkpoints") else "--overwrite"
    code, shown = run(context, command(output, resumed, **options), log)
    assert code == 0, shown
    wanted, found = adapter(finished), adapter(output)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_full_disk_leaves_the_earlier_checkpoints(finished: Path, command: Callable, tmp_path: Path) -> None:
    """On a real file system that is too small: the third checkpoint finds no room beside two others."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = {"max_steps": 4, "save_steps": 1, "eval_limit": 2}
    arguments, conditions = command(disk / "run", **options), Conditions(disk=(disk, 350_000))
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
