"""Small described folders, made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ept.data import load_tasks
from ept.data.sentiment import ARCHIVE, default_cache_dir
from ept.data.spec import DataError, TaskData


class FolderBuilder:
    """An index and parquet files that start out right; tests break them one at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tasks: dict[str, dict[str, Any]] = {}

    def task(self, name: str, columns: dict[str, list[Any]], **entry: Any) -> dict[str, Any]:
        """Add a task whose splits all hold ``columns``; returns its index entry."""
        splits = {}
        for split in ("train", "validation", "test"):
            self.write(f"{name}/{split}.parquet", columns)
            splits[split] = {"file": f"{name}/{split}.parquet"}
        self.tasks[name] = {"splits": splits, **entry}
        return self.tasks[name]

    def write(self, file: str, columns: dict[str, Any]) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)

    def classification(self, name: str = "polarity") -> dict[str, Any]:
        columns = {"sentence": ["good", "bad", "fine"], "label": [1, 0, 1]}
        return self.task(
            name,
            columns,
            kind="classification",
            text_columns=["sentence"],
            metric="accuracy+f1",
            label_names=["negative", "positive"],
        )

    def regression(self, name: str = "likeness") -> dict[str, Any]:
        columns = {"a": ["x", "y", "z"], "b": ["x", "q", "r"], "label": [5.0, 1.5, 0.0]}
        return self.task(
            name, columns, kind="regression", text_columns=["a", "b"], metric="pearson+spearman", label_names=None
        )

    def multiple_choice(self, name: str = "quiz") -> dict[str, Any]:
        columns = {"question": ["2+2?", "1+1?"], "choices": [["4", "5"], ["1", "3", "2"]], "label": [0, 2]}
        return self.task(
            name,
            columns,
            kind="multiple_choice",
            text_columns=["question", "choices"],
            metric="accuracy",
            label_names=["A", "B", "C"],
        )

    def load(self, tasks: list[str] | None = None) -> list[TaskData]:
        (self.root / "index.json").write_text(json.dumps({"format": 1, "tasks": self.tasks}), encoding="utf-8")
        return load_tasks(str(self.root), tasks)


@pytest.fixture
def folder(tmp_path: Path) -> FolderBuilder:
    root = tmp_path / "data"
    root.mkdir()
    return FolderBuilder(root)


@pytest.fixture
def raises() -> Callable[..., None]:
    """Call and require a DataError whose message has every given part."""

    def check(action: Callable[[], Any], *parts: str) -> None:
        with pytest.raises(DataError) as caught:
            action()
        for part in parts:
            assert part in str(caught.value), f"{part!r} is not in: {caught.value}"

    return check


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """A folder of real tasks: ``$EPT_TEST_DATA``, else ``shared/data`` beside the repository."""
    path = Path(os.environ.get("EPT_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (path / "index.json").is_file():
        pytest.skip(f"no index.json in {path}: set EPT_TEST_DATA to a described data folder")
    return path


@pytest.fixture(scope="session")
def sentiment_cache() -> Path:
    """The user's cache with the archive in it (fetched once, 2.4 MB)."""
    try:
        load_tasks("sentiment", ["tweets"])
    except DataError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(f"the sentiment data is neither cached nor reachable: {error}")
    assert (default_cache_dir() / ARCHIVE).is_file()
    return default_cache_dir()
