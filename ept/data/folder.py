"""Tasks from a folder of parquet files described by an ``index.json``.

The index is one JSON object. Keys without "optional" are required; keys that are not listed are ignored::

    {"format": 1,                                       # optional; 1 is the only format
     "tasks": {
       "mrpc": {
         "kind": "classification",                      # or "regression", "multiple_choice"
         "text_columns": ["sentence1", "sentence2"],    # one or two; multiple choice: question and list of choices
         "metric": "accuracy+f1",                       # or matthews_corrcoef, pearson, spearman; the first leads
         "label_names": ["no", "yes"],                  # by class index; optional (null) for regression
         "label_range": [0.0, 5.0],                     # optional, regression; else the splits', else found in train
         "splits": {                                    # train and validation; test is optional; others are ignored
           "train": {
             "file": "mrpc/train.parquet",              # relative; must stay inside the folder, links included
             "sha256": "...",                           # optional; checked if present
             "label_range": [0.0, 5.0]                  # optional, regression
           }}}}}

Every file holds the text columns (strings; for multiple choice the second is a list of strings) and ``label``: a class
index, an index into the choices, or a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..config import is_number
from ..files import read_json
from .spec import DataError, TaskData, TaskSpec, make_split, select

_METRICS = {"matthews_corrcoef": "matthews", **{name: name for name in ("accuracy", "f1", "pearson", "spearman")}}


def load_folder(folder: str | Path, tasks: Sequence[str] | None = None) -> list[TaskData]:
    """Read the named tasks (None: all, in the index's order) of a described folder.

    Descriptions, files, checksums and columns of all tasks are checked before the first row is read.

    Raises:
        DataError: folder or index missing or malformed, unknown task, a file missing or outside the folder, a wrong
            checksum, a missing column, an empty split, a missing text, a bad label, an unknown kind or metric.
    """
    root = Path(folder)
    entries = _read_index(root)
    names = select(tasks, list(entries), f"the folder {str(root)!r}")
    specs = {name: _spec(name, entries[name]) for name in names}
    files = {name: _files(root, specs[name], entries[name]["splits"]) for name in names}
    return [_read_task(specs[name], files[name]) for name in names]


def _read_index(root: Path) -> dict[str, dict[str, Any]]:
    if not root.is_dir():
        raise DataError(f"data folder {str(root)!r} is not a directory")
    path = root / "index.json"
    if not path.is_file():
        raise DataError(f"data folder {str(root)!r} has no index.json; see ept.data.folder for its format")
    try:
        index = read_json(path)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not isinstance(index, dict) or not isinstance(index.get("tasks"), dict) or not index["tasks"]:
        raise DataError(f"{str(path)!r} must be an object with a non-empty object 'tasks'")
    if index.get("format", 1) != 1:
        raise DataError(f"{str(path)!r} has format {index['format']!r}; this version reads format 1")
    return index["tasks"]


def _spec(name: str, entry: Any) -> TaskSpec:
    """The task's description, with ``label_range`` None where the index gives none."""
    where = f"index.json, task {name!r}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object, not {entry!r}")
    missing = [key for key in ("kind", "text_columns", "metric", "splits") if key not in entry]
    if missing:
        raise DataError(f"{where}: {', '.join(missing)} missing; there is: {', '.join(entry)}")
    for key, optional in (("text_columns", False), ("label_names", True)):
        value = entry.get(key)
        if not (value is None and optional) and not _all_strings(value):
            raise DataError(f"{where}: {key} must be a list of strings, not {value!r}")
    metrics = str(entry["metric"]).split("+")
    unknown = [metric for metric in metrics if metric not in _METRICS]
    if unknown:
        raise DataError(f"{where}: unknown metric {'+'.join(unknown)!r}; allowed, joined by '+': {', '.join(_METRICS)}")
    splits = entry["splits"]
    if not isinstance(splits, dict) or not all(isinstance(split, dict) for split in splits.values()):
        raise DataError(f"{where}: splits must be an object of objects, not {splits!r}")
    label_names = entry.get("label_names")
    return TaskSpec(
        name=name,
        kind=entry["kind"],
        text_columns=tuple(entry["text_columns"]),
        label_names=None if label_names is None else tuple(label_names),
        metrics=tuple(_METRICS[metric] for metric in metrics),
        label_range=_declared_range(where, entry),
    )


def _all_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _declared_range(where: str, entry: dict[str, Any]) -> tuple[float, float] | None:
    """The task's own label_range, else the hull of those of its splits, else None."""
    holders = [entry] if entry.get("label_range") is not None else list(entry["splits"].values())
    ranges = [holder["label_range"] for holder in holders if holder.get("label_range") is not None]
    for value in ranges:
        if not isinstance(value, list) or len(value) != 2 or not all(map(is_number, value)):
            raise DataError(f"{where}: label_range must be a list of two numbers, not {value!r}")
    return (float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))) if ranges else None


def _files(root: Path, spec: TaskSpec, splits: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Path of every split, with its place, checksum and columns checked."""
    missing = [split for split in ("train", "validation") if split not in splits]
    if missing:
        raise DataError(f"index.json, task {spec.name!r}: no split {', '.join(missing)}; there is: {', '.join(splits)}")
    paths: dict[str, Path] = {}
    for split in ("train", "validation", "test"):
        if split in splits:
            where = f"task {spec.name!r}, split {split!r}"
            paths[split] = _inside(root, where, splits[split].get("file"))
            _check_file(where, spec, paths[split], splits[split].get("sha256"))
    return paths


def _inside(root: Path, where: str, file: Any) -> Path:
    if not isinstance(file, str) or not file:
        raise DataError(f"{where}: file must be a relative path, not {file!r}")
    try:
        path = (root / file).resolve()
        there = path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a null character
        raise DataError(f"{where}: file {file!r} cannot be a file's name: {error}") from error
    if Path(file).is_absolute() or not path.is_relative_to(root.resolve()):
        raise DataError(
            f"{where}: file {file!r} is outside the data folder {str(root)!r}; only files inside it are read"
        )
    if not there:
        raise DataError(f"{where}: file {file!r} is missing in {str(root)!r}")
    return path


def _check_file(where: str, spec: TaskSpec, path: Path, sha256: str | None) -> None:
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise DataError(f"{where}: {path.name} has sha256 {found}, the index says {sha256}")
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name is not UTF-8
        raise DataError(f"{where}: {path.name} is not a readable parquet file: {error}") from error
    for column in (*spec.text_columns, "label"):
        if column not in schema.names:
            raise DataError(f"{where}: no column {column!r} in {path.name}; there is: {', '.join(schema.names)}")


def _read_task(spec: TaskSpec, files: dict[str, Path]) -> TaskData:
    splits = {split: _read_split(spec, split, path) for split, path in files.items()}
    if spec.kind == "regression" and spec.label_range is None:
        labels = splits["train"].with_format("numpy")["label"][:]
        if labels.min() == labels.max():
            raise DataError(f"task {spec.name!r}, split 'train': every label is {labels.min()}; nothing can be learned")
        spec = replace(spec, label_range=(float(labels.min()), float(labels.max())))
    return TaskData(spec, **splits)


def _read_split(spec: TaskSpec, split: str, path: Path) -> Dataset:
    try:
        table = pq.read_table(path, columns=[*spec.text_columns, "label"])
        columns = [table.column(name).to_pylist() for name in (*spec.text_columns, "label")]
    except (pa.ArrowException, OSError, ValueError) as error:  # damaged behind its schema, or text that is not UTF-8
        raise DataError(f"task {spec.name!r}, split {split!r}: {path.name} cannot be read: {error}") from error
    if spec.kind == "multiple_choice":
        return make_split(spec, split, text=columns[0], choices=columns[1], label=columns[2])
    pair = columns[1] if len(spec.text_columns) == 2 else None
    return make_split(spec, split, text=columns[0], text_pair=pair, label=columns[-1])
