"""Tasks from a user's own files: one table a task, in CSV, TSV, JSON lines or parquet.

A table has one or two columns of texts and a column of labels, found by their names (`TEXTS`, `LABELS`) or by being the
only ones that can be meant, unless they are named. Labels may be names (classes), whole numbers of at most 20 values
(classes) or other numbers (regression).

A task may be a folder with ``train``, ``validation`` and ``test`` files, or a file with a column ``split``. Where there
is no validation split, a tenth of the rows is held out: by a hash of the text, so that it is the same rows every time
and equal texts stay together.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .spec import DataError, TaskData, TaskSpec, draw, make_split

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

#: Names of columns, most telling first. Two texts: the first pair that is there.
LABELS = ("label", "labels", "target", "class", "category", "topic", "intent", "sentiment", "score", "rating", "stars")
TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "body",
    "headline",
    "title",
    "question",
    "comment",
    "message",
    "tweet",
)
PAIRS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_HELD_OUT = 0.1
_MOST_CLASSES = 20  # of whole numbers: more of them are a quantity
_MOST_NAMES = 200  # of strings: more of them are texts

Columns = dict[str, list[Any]]


class Roles(NamedTuple):
    """Which columns of a table are its texts (one or two) and its label."""

    texts: tuple[str, ...]
    label: str


def parse_roles(text: str) -> tuple[str, Roles]:
    """``TASK=TEXT:LABEL`` or ``TASK=TEXT,TEXT:LABEL`` as the task's name and its columns.

    Raises:
        ValueError: another form.
    """
    name, _, columns = text.partition("=")
    texts, _, label = columns.rpartition(":")
    listed = tuple(texts.split(","))
    if not name or not label or not all(listed) or len(listed) > 2:
        raise ValueError(f"must be TASK=TEXT:LABEL or TASK=TEXT,TEXT:LABEL with names of columns, got {text!r}")
    return name, Roles(listed, label)


def tables_of(folder: Path) -> dict[str, Path]:
    """The tasks of a folder without ``index.json``: its tables, and its folders that hold a table ``train``."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        is_table = path.is_file() and path.suffix in SUFFIXES
        is_task = path.is_dir() and any((path / f"train{suffix}").is_file() for suffix in SUFFIXES)
        if not is_table and not is_task:
            continue
        if path.stem in found:
            raise DataError(f"data folder {str(folder)!r} has two tables of the name {path.stem!r}; keep one")
        found[path.stem if is_table else path.name] = path
    return found


def load_tables(
    tables: Mapping[str, str | Path],
    *,
    columns: Mapping[str, Roles] | None = None,
    say: Callable[[str], object] = logger.info,
) -> list[TaskData]:
    """One task a table.

    Args:
        tables: file or folder by the task's name.
        columns: of tasks whose columns are not to be guessed.
        say: told in a line for each task what was guessed.

    Raises:
        DataError: no such file, a kind of file that is not read, a damaged one, columns that cannot be guessed or are
            not there, a missing or blank text, a label that is missing or not of the others' kind, or too few rows.
    """
    named = dict(columns or {})
    unknown = [name for name in named if name not in tables]
    if unknown:
        raise DataError(f"columns names the task {unknown[0]!r}; there is: {', '.join(tables)}")
    return [_task(name, Path(path), named.get(name), say) for name, path in tables.items()]


def _task(name: str, path: Path, roles: Roles | None, say: Callable[[str], object]) -> TaskData:
    splits = _read_splits(name, path)
    everything = list(splits.values())
    roles = _guess(name, everything[0]) if roles is None else roles
    for split, table in splits.items():
        missing = [column for column in (*roles.texts, roles.label) if column not in table]
        if missing:
            raise DataError(f"task {name!r}, split {split!r}: no column {missing[0]!r}; there is: {', '.join(table)}")
    made = "validation" not in splits
    if made:
        splits = _hold_out(name, splits, roles)
    labels = [value for table in splits.values() for value in table[roles.label]]
    spec, convert = _spec(name, roles, labels, splits["train"][roles.label])
    built = {}
    for split, table in splits.items():
        texts = [table[column] for column in roles.texts]
        values = [convert(value, split, row) for row, value in enumerate(table[roles.label])]
        built[split] = make_split(
            spec, split, text=texts[0], text_pair=texts[1] if len(texts) == 2 else None, label=values
        )
    what = "a number" if spec.label_names is None else f"{spec.num_labels} classes: {_shortened(spec.label_names)}"
    sizes = " + ".join(f"{len(rows):,} {split}" for split, rows in built.items())
    origin = " (a tenth held out by a hash of the text)" if made else ""
    texts_said = " and ".join(map(repr, roles.texts))
    say(f"task {name!r}: text {texts_said}, label {roles.label!r} ({what}), {sizes} rows{origin}")
    return TaskData(spec, built["train"], built["validation"], built.get("test"))


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


# ---- reading


def _read_splits(name: str, path: Path) -> dict[str, Columns]:
    if path.is_dir():
        files = {_SPLITS.get(file.stem): file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES}
        splits = {split: _read(name, file) for split, file in files.items() if split is not None}
        if "train" not in splits:
            raise DataError(f"task {name!r}: {str(path)!r} has no table train ({', '.join(SUFFIXES)})")
        return splits
    if not path.is_file():
        raise DataError(f"task {name!r}: {str(path)!r} is not a file")
    table = _read(name, path)
    if "split" not in table:
        return {"train": table}
    by_split: dict[str, list[int]] = {}
    for row, value in enumerate(table.pop("split")):
        split = _SPLITS.get(str(value).strip().casefold())
        if split is None:
            raise DataError(f"task {name!r}, row {row}: split is {value!r}; allowed: {', '.join(_SPLITS)}")
        by_split.setdefault(split, []).append(row)
    if "train" not in by_split:
        raise DataError(f"task {name!r}: no row of the split train; there is: {', '.join(by_split)}")
    return {
        split: {column: [values[row] for row in rows] for column, values in table.items()}
        for split, rows in by_split.items()
    }


def _read(name: str, path: Path) -> Columns:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"task {name!r}: {path.name!r} is not one of {', '.join(SUFFIXES)}")
    try:
        table = readers[path.suffix](path)
    except (pa.ArrowException, csv.Error, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        if isinstance(error, DataError):
            raise
        raise DataError(f"task {name!r}: {path.name} cannot be read: {error}") from error
    if not table or not next(iter(table.values())):
        raise DataError(f"task {name!r}: {path.name} has no rows")
    return table


def _read_csv(path: Path) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        heads = next(reader, [])
        if len(set(heads)) != len(heads) or not all(heads):
            raise ValueError(f"the first line must name the columns, each differently, got {heads}")
        table: Columns = {head: [] for head in heads}
        for number, row in enumerate(reader):
            if not row:
                continue
            if len(row) != len(heads):
                raise ValueError(f"row {number} has {len(row)} fields, the first line {len(heads)}")
            for head, value in zip(heads, row, strict=True):
                table[head].append(value)
    return table


def _read_json(path: Path) -> Columns:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number + 1} is not an object")
                rows.append(row)
    heads = dict.fromkeys(head for row in rows for head in row)
    return {head: [row.get(head) for row in rows] for head in heads}


def _read_parquet(path: Path) -> Columns:
    table = pq.read_table(path)
    return {name: table.column(name).to_pylist() for name in table.column_names}


# ---- what is what


def _guess(name: str, table: Columns) -> Roles:
    labels = [column for column in LABELS if column in table]
    label = labels[0] if labels else None
    for pair in PAIRS:
        if set(pair) <= set(table):
            texts: tuple[str, ...] = pair
            break
    else:
        texts = tuple(column for column in TEXTS if column in table and column != label)[:1]
    if label is None or not texts:
        # What is left over, where nothing else can be meant.
        strings = [c for c, values in table.items() if c != label and _reads_as_text(values)]
        texts = texts or (tuple(strings) if len(strings) == 1 else ())
        rest = [column for column in table if column not in texts]
        label = label or (rest[0] if texts and len(rest) == 1 else None)
    if label is None or not texts:
        raise DataError(
            f"task {name!r}: which columns are text and label cannot be guessed from {', '.join(table)}; name them: "
            f"--columns {name}=TEXT:LABEL"
        )
    return Roles(texts, label)


def _reads_as_text(values: Sequence[Any]) -> bool:
    """Strings that are mostly different and hold blanks."""
    strings = [value for value in values if isinstance(value, str)]
    return len(strings) > len(values) / 2 and sum(" " in value.strip() for value in strings) > len(strings) / 2


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _spec(
    name: str, roles: Roles, labels: Sequence[Any], trained: Sequence[Any]
) -> tuple[TaskSpec, Callable[[Any, str, int], float]]:
    """The task, and what a label of the table is in it."""
    values = [value for value in labels if value is not None and str(value).strip()]
    numbers = [_number(value) for value in values]
    distinct = {number for number in numbers if number is not None}
    all_numbers = None not in numbers and bool(numbers)
    columns = roles.texts
    if all_numbers and (len(distinct) > _MOST_CLASSES or any(value != int(value) for value in distinct)):
        own = [number for number in map(_number, trained) if number is not None]
        if not own or min(own) == max(own):
            raise DataError(f"task {name!r}: every training label is {own[:1]}; nothing can be learned")
        low, high = min(distinct), max(distinct)
        spec = TaskSpec(name, "regression", columns, None, ("pearson", "spearman"), (low, high))

        def to_number(value: Any, split: str, row: int) -> float:
            number = _number(value)
            if number is None:
                raise DataError(f"task {name!r}, split {split!r}, row {row}: {roles.label} is {value!r}; not a number")
            return number

        return spec, to_number
    if any(isinstance(value, (list, dict)) for value in values):
        raise DataError(f"task {name!r}: {roles.label!r} holds lists or objects; names or numbers are needed")
    keys = sorted(distinct) if all_numbers else sorted({str(value).strip() for value in values})
    names = tuple(f"{key:g}" if isinstance(key, float) else key for key in keys)
    if len(names) > _MOST_NAMES:
        raise DataError(
            f"task {name!r}: {roles.label!r} has {len(names)} different values, which reads like text; name the "
            f"columns: --columns {name}=TEXT:LABEL"
        )
    if len(names) < 2:
        raise DataError(f"task {name!r}: every label is {names[:1]}; at least two classes are needed")
    metrics = ("accuracy", "f1")
    spec = TaskSpec(name, "classification", columns, names, metrics)
    places = {key: place for place, key in enumerate(keys)}

    def to_class(value: Any, split: str, row: int) -> float:
        key = _number(value) if all_numbers else None if value is None else str(value).strip()
        if key not in places:
            raise DataError(f"task {name!r}, split {split!r}, row {row}: {roles.label} is {value!r}; a label is needed")
        return places[key]

    return spec, to_class


def _hold_out(name: str, splits: Mapping[str, Columns], roles: Roles) -> dict[str, Columns]:
    table = splits["train"]
    draws = [draw(name, _key(texts)) for texts in zip(*(table[column] for column in roles.texts), strict=True)]
    if len(set(draws)) < 2:
        raise DataError(
            f"task {name!r}: {len(draws)} rows are too few to hold out a validation split; give one (a column "
            "'split', or a folder with train and validation)"
        )
    limit = max(_HELD_OUT, min(draws))  # of few rows at least one text
    held = [drawn <= limit for drawn in draws]

    def chosen(wanted: bool) -> Columns:
        return {
            column: [value for value, out in zip(values, held, strict=True) if out is wanted]
            for column, values in table.items()
        }

    return {**splits, "train": chosen(False), "validation": chosen(True)}


def _key(texts: Iterable[Any]) -> str:
    """What texts that differ in case and spacing alone have in common."""
    return "\n".join(re.sub(r"\s+", " ", str(text)).strip().casefold() for text in texts)
