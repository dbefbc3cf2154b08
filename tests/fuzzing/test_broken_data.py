"""Broken data folders and task files: a ``DataError`` (or ValueError) that says what is wrong, or the rows."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ept
from ept.data import DataError, load_tasks
from ept.data.hub import load_hub
from ept.files import TASKS_FILE, read_json
from ept.training import saving

from .saved import ODD_JSON, make_base
from .support import COUNTED, FACTOR

_ROWS = {"train": 9, "validation": 4}


def _write(folder: Path) -> None:
    """A folder of three tasks, one of each kind."""
    columns = {
        "polarity": {"sentence": ["good", "bad", "fine"], "label": [1, 0, 1]},
        "likeness": {"left": ["a", "b", "c"], "right": ["x", "y", "z"], "label": [0.0, 2.5, 5.0]},
        "quiz": {
            "question": ["1+1?", "2+2?", "3?"],
            "choices": [["1", "2"], ["4", "3"], ["3", "5"]],
            "label": [1, 0, 0],
        },
    }
    described = {
        "polarity": {"kind": "classification", "metric": "accuracy", "label_names": ["no", "yes"]},
        "likeness": {"kind": "regression", "metric": "pearson", "label_range": [0, 5]},
        "quiz": {"kind": "multiple_choice", "metric": "accuracy", "label_names": ["A", "B"]},
    }
    for name, table in columns.items():
        (folder / name).mkdir(parents=True)
        splits = {}
        for split, count in _ROWS.items():
            pq.write_table(
                pa.table({key: values * count for key, values in table.items()}), folder / name / f"{split}.pq"
            )
            splits[split] = {"file": f"{name}/{split}.pq"}
        described[name] |= {"text_columns": [key for key in table if key != "label"], "splits": splits}
    (folder / "index.json").write_text(json.dumps({"format": 1, "tasks": described}))


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in [(*path, key), *_places(item, (*path, key))]]


def _break_index(folder: Path, rng: random.Random) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    *parents, last = rng.choice(_places(index))
    holder = index
    for key in parents:
        holder = holder[key]
    if rng.random() < 0.2:
        del holder[last]
    else:
        traversal = ("../secret.pq", "/etc/passwd", "polarity/../../secret.pq", "polarity", "x" * 5000, "polarity/\0")
        holder[last] = rng.choice((*ODD_JSON, *traversal))
    path.write_text(json.dumps(index))


def _break_text(folder: Path, rng: random.Random) -> None:
    path = folder / "index.json"
    data = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        data = bytearray(
            rng.choice((b"", b"\xff\xfe{}", b"[" * 10**5, b'{"tasks":' * 10**4, b"1" + b"0" * 5000, b"null"))
        )
    else:
        data = bytearray(rng.randbytes(100))
    path.write_bytes(bytes(data))


def _break_bytes(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.rglob("*.pq")))
    data = bytearray(path.read_bytes())
    kind = rng.randrange(3)
    if kind == 0:
        data = data[: rng.choice((0, 4, rng.randrange(len(data)), len(data) - 1))]
    elif kind == 1:
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data = bytearray(rng.choice((b"PAR1PAR1", b'{"sentence": "cut', b"PAR1" + b"\xff" * 40 + b"PAR1", b"")))
    path.write_bytes(bytes(data))


def _break_columns(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.rglob("*.pq")))
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    rows = len(table)
    odd = (
        [None] * rows,
        [1.5] * rows,
        [-1] * rows,
        ["text"] * rows,
        [b"\xff\xfe"] * rows,
        [["x"]] * rows,
        [[None, "x"]] * rows,
        [{"a": 1}] * rows,
        [float("nan")] * rows,
        [2**62] * rows,
        [True] * rows,
        [["a", "b", "c", "d"]] * rows,
    )
    kind = rng.randrange(5)
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.slice(0, 0)
    elif kind == 2:
        table = table.append_column(name, table.column(name))
    else:
        table = table.set_column(table.column_names.index(name), name, pa.array(rng.choice(odd)))
    pq.write_table(table, path)


_BREAKERS: dict[str, Callable[[Path, random.Random], None]] = {
    "index": _break_index,
    "index text": _break_text,
    "parquet bytes": _break_bytes,
    "columns": _break_columns,
}


@pytest.mark.parametrize("kind", _BREAKERS)
def test_a_broken_folder_is_reported(kind: str, tmp_path: Path) -> None:
    _write(tmp_path / "whole")
    secret = pa.table({"sentence": ["s"], "left": ["s"], "right": ["s"], "question": ["s"], "label": [0]})
    pq.write_table(secret, tmp_path / "secret.pq")
    for seed in range(40 * FACTOR):
        folder = tmp_path / "broken"
        shutil.copytree(tmp_path / "whole", folder)
        _BREAKERS[kind](folder, random.Random(seed))
        try:
            tasks = load_tasks(str(folder))
        except DataError:
            COUNTED[f"data folders, {kind}"]["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        else:
            COUNTED[f"data folders, {kind}"]["served"] += 1
            for task in tasks:
                for split in (task.train, task.validation):
                    assert all(isinstance(text, str) and text != "s" for text in split["text"]), seed
        shutil.rmtree(folder)


@pytest.mark.parametrize("text", ['{"a": "x", "label": 1}\n{"a": "y", "lab', "\0\1\2", "", '{"a": 1}\n[]\n'])
def test_cut_lines_of_a_local_dataset_are_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(DataError):
        load_hub(str(tmp_path), cache_dir=tmp_path / "cache")


# --- the task file beside an adapter ----------------------------------------------------------------------------------


def test_a_broken_task_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"name": "polarity", "kind": "classification", "text_columns": ["sentence"], "label_names": ["no", "yes"]}
    whole = {"format": 1, "base_model": "minilm", "tasks": [spec | {"metrics": ["accuracy"], "label_range": None}]}
    config = ept.EPTConfig(r=2, kernel_sizes=(2, 3), task_names=["polarity"], target_modules=["first"])
    peft.get_peft_model(make_base(), config).save_pretrained(tmp_path)
    monkeypatch.setattr(saving, "load_base", lambda name, specs: (_ for _ in ()).throw(StopIteration))
    for seed in range(100 * FACTOR):
        content, rng = json.loads(json.dumps(whole)), random.Random(seed)
        *parents, last = rng.choice(_places(content))
        holder = content
        for key in parents:
            holder = holder[key]
        holder[last] = rng.choice(ODD_JSON)
        text = json.dumps(content)
        (tmp_path / TASKS_FILE).write_text(text if rng.random() < 0.8 else text[: rng.randrange(len(text))])
        try:
            saving.load_trained(tmp_path)
        except ValueError as error:
            COUNTED["task files"]["refused"] += 1
            refused = str(error)
            assert refused, seed
        except (StopIteration, RuntimeError):  # as far as the base model
            COUNTED["task files"]["served"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}: {content}") from error


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "1" + "0" * 5000, "{'a'", b"\xff\xfe"], ids=["deep", "long", "quote", "utf8"]
)
def test_json_that_cannot_be_read_is_named(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"some\.json.* is not valid JSON"):
        read_json(path)


def test_a_trained_adapter_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / TASKS_FILE).write_text(json.dumps({"format": 1, "base_model": "minilm", "tasks": []}))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors; adapter_model\.bin can run code"):
        saving.load_trained(tmp_path)
