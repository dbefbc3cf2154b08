"""Broken adapter folders through every door: the error is named, or what was loaded is what the file holds."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ept.inspecting.cli import main as inspect_main

from .saved import CONFIGS, WEIGHTS, break_config, break_weights, make, make_base, outputs
from .support import COUNTED, FACTOR

#: Errors that name what is wrong. PEFT, safetensors and Python's JSON reader (the last for a config that is nested too
#: deeply) raise theirs before this package is asked.
NAMED = (ValueError, TypeError, OSError, KeyError, SafetensorError, RecursionError)

_EXAMPLES = 12 * FACTOR


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model = make(request.param)
    model.save_pretrained(folder)
    return request.param, folder, outputs(model)


@contextlib.contextmanager
def broken(folder: Path, tmp_path: Path, breaker, seed: int) -> Iterator[tuple[Path, str]]:
    """A copy of a saved folder, broken."""
    copy = tmp_path / str(seed)
    shutil.copytree(folder, copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield copy, breaker(copy, random.Random(seed))
    shutil.rmtree(copy)


def holds(model: peft.PeftModel, folder: Path, name: str = "default") -> None:
    """What the model has is what the file says, tensor by tensor."""
    found = load_file(folder / WEIGHTS)
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    for key, tensor in state.items():
        assert key in found, f"{key} is not in the file: what the model has there is from nowhere"
        torch.testing.assert_close(tensor, found[key].to(tensor.dtype), rtol=0, atol=0, msg=key)


def test_the_whole_file_is_loaded(saved: tuple[str, Path, torch.Tensor]) -> None:
    _, folder, expected = saved
    model = peft.PeftModel.from_pretrained(make_base(), folder).eval()
    holds(model, folder)
    assert torch.equal(outputs(model), expected)


def test_broken_weights(saved: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    name, folder, _ = saved
    category = COUNTED["adapter weights, from_pretrained"]
    for seed in range(_EXAMPLES):
        with broken(folder, tmp_path, break_weights, seed) as (copy, kind):
            try:
                model = peft.PeftModel.from_pretrained(make_base(), copy)
            except NAMED:
                category["refused"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}, {kind}: {type(error).__name__}: {error}") from error
            try:
                holds(model, copy)
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}, {kind}: {error}") from error
            category["served"] += 1


def test_a_failed_load_adapter_changes_no_output(saved: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    name, folder, expected = saved
    category = COUNTED["adapter weights, load_adapter"]
    for seed in range(1000, 1000 + _EXAMPLES):
        model = peft.PeftModel.from_pretrained(make_base(), folder).eval()
        with broken(folder, tmp_path, break_weights, seed) as (copy, kind):
            try:
                model.load_adapter(copy, "second")
                holds(model, copy, "second")
                category["served"] += 1
            except NAMED:
                category["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}, {kind}: {type(error).__name__}: {error}") from error
            assert torch.equal(outputs(model), expected), (name, seed, kind)
            with contextlib.suppress(*NAMED):  # into the adapter that is in use: all of it, or nothing
                model.load_adapter(copy, "default")
                holds(model, copy)
                continue
            assert torch.equal(outputs(model), expected), (name, seed, kind)
        if "second" in model.peft_config:  # PEFT leaves a half-made adapter behind, which nothing uses
            model.delete_adapter("second")
        assert torch.equal(outputs(model), expected), (name, seed, kind)
        model.load_adapter(folder, "second")
        model.set_adapter("second")
        assert torch.equal(outputs(model), expected), (name, seed, kind)


def test_broken_configs(saved: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    name, folder, _ = saved
    category = COUNTED["adapter configs, from_pretrained"]
    for seed in range(2000, 2000 + _EXAMPLES):
        with broken(folder, tmp_path, break_config, seed) as (copy, kind):
            try:
                model = peft.PeftModel.from_pretrained(make_base(), copy)
                holds(model, copy)
                category["served"] += 1
            except NAMED:
                category["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}, {kind}: {type(error).__name__}: {error}") from error


def test_ept_inspect_reports_a_broken_folder(saved: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    name, folder, _ = saved
    category = COUNTED["adapter folders, ept-inspect"]
    for seed in range(3000, 3000 + _EXAMPLES):
        breaker = break_weights if seed % 2 else break_config
        with broken(folder, tmp_path, breaker, seed) as (copy, kind):
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                    inspect_main([str(copy), "--quiet"])
                category["served"] += 1
            except SystemExit:
                category["refused"] += 1
                assert "error:" in said.getvalue(), (name, seed, kind)
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}, {kind}: {type(error).__name__}: {error}") from error


# --- pickles in disguise ----------------------------------------------------------------------------------------------


class _Bomb:
    """What a pickle can do to whoever reads it: here, write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "torch.save"])
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter", "ept-inspect"])
def test_nothing_in_a_pickle_is_run(name: str, zipped: bool, door: str, tmp_path: Path) -> None:
    model = make("ept")
    folder, mark = tmp_path / "adapter", tmp_path / "it-ran"
    model.save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    state = {"base_model.model.first.ept_adapters.A": _Bomb(mark)}
    if zipped:
        torch.save(state, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(state))
    doors = {
        "from_pretrained": lambda: peft.PeftModel.from_pretrained(make_base(), folder),
        "load_adapter": lambda: model.load_adapter(folder, "second"),
        "ept-inspect": lambda: inspect_main([str(folder), "--quiet"]),
    }
    with pytest.raises((*NAMED, pickle.UnpicklingError, SystemExit)):
        doors[door]()
    assert not mark.exists(), "the pickle ran"
    COUNTED["pickles in disguise"]["refused"] += 1


def test_the_bomb_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Bomb(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("package", ["ept", "ept_kernels"])
def test_this_package_never_unpickles(package: str) -> None:
    for path in (Path(__file__).parents[2] / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("torch.load(", "import pickle", "pickle.load", "import dill", "joblib", "allow_pickle=True"):
            assert word not in text, f"{path} has {word}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: None, "head.weight"),
        (lambda tensor: tensor[:, :-1], r"head\.modules_to_save\.default\.weight is \[3, 7\] in the checkpoint"),
        (lambda tensor: tensor.long(), r"head\.modules_to_save\.default\.weight as torch\.int64, not torch\.float32"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_a_broken_head_changes_nothing_of_the_adapter_in_use(change, message: str, tmp_path: Path) -> None:
    make("ept").save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(make_base(), tmp_path).eval()
    expected = outputs(model)
    tensors = {key: tensor + 1 for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    head = change(tensors.pop("base_model.model.head.weight"))
    if head is not None:
        tensors["base_model.model.head.weight"] = head.contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises((ValueError, KeyError), match=message):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(outputs(model), expected)
