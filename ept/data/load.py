"""One door to all data sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .folder import load_folder
from .hub import PREFIX, load_hub
from .sentiment import load_sentiment
from .spec import DataError, TaskData, select
from .tables import SUFFIXES, Roles, load_tables, logger, tables_of

_SOURCES = (
    f"'sentiment' (the default), a file ({', '.join(SUFFIXES)}), NAME=FILE, a folder of such files, a folder with an "
    "index.json, or 'hub:<dataset id>'"
)


def load_tasks(
    source: str | Path | Sequence[str] = "sentiment",
    tasks: Sequence[str] | None = None,
    *,
    columns: Mapping[str, Roles] | None = None,
    cache_dir: str | Path | None = None,
    say: Callable[[str], object] = logger.info,
) -> list[TaskData]:
    """Load tasks, checked and in common columns.

    Args:
        source: ``sentiment``; a file of one task, ``topic.csv`` or ``topic=headlines.csv`` (`ept.data.tables`), or
            several of them; a folder of such files; a folder with an ``index.json`` (`ept.data.folder`; write
            ``./sentiment`` for one of that name); or ``hub:<dataset id>`` (`ept.data.hub`).
        tasks: names in the wanted order; None means all.
        columns: text and label columns by task, of files whose columns are not to be guessed.
        cache_dir: where downloads are kept; None means ``$EPT_CACHE`` or the user's cache folder for ``sentiment`` and
            the `datasets` library's own cache for the hub.
        say: told, in a line for each file, what was guessed.

    Raises:
        DataError: see `load_sentiment`, `load_folder`, `load_hub`, `load_tables`.
    """
    listed = [str(source)] if isinstance(source, (str, Path)) else [str(part) for part in source]
    if not listed:
        raise DataError(f"data source is empty; allowed: {_SOURCES}")
    (first, *others) = listed
    if not others and not _is_table(first):
        if first == "sentiment":
            return load_sentiment(tasks, cache_dir=cache_dir)
        if first.startswith(PREFIX):
            return load_hub(first.removeprefix(PREFIX), tasks, cache_dir=cache_dir)
        if not Path(first).is_dir():
            raise DataError(f"data source {first!r} is not a directory; allowed: {_SOURCES}")
        tables = {} if (Path(first) / "index.json").exists() else tables_of(Path(first))
        if not tables:
            return load_folder(first, tasks)
        return _chosen(tables, tasks, columns, say, f"the folder {first!r}")
    tables = {}
    for part in listed:
        name, path = _named(part)
        if name in tables:
            raise DataError(f"data source: the task {name!r} is given twice; name one of them: NAME={path}")
        tables[name] = path
    return _chosen(tables, tasks, columns, say, "the data")


def _chosen(
    tables: Mapping[str, Path],
    tasks: Sequence[str] | None,
    columns: Mapping[str, Roles] | None,
    say: Callable[[str], object],
    source: str,
) -> list[TaskData]:
    names = select(tasks, list(tables), source)
    return load_tables({name: tables[name] for name in names}, columns=columns, say=say)


def _is_table(source: str) -> bool:
    return Path(source).suffix in SUFFIXES or ("=" in source and not Path(source).exists())


def _named(part: str) -> tuple[str, Path]:
    """``NAME=PATH``, or a path whose stem is the name."""
    if "=" in part and not Path(part).exists():
        name, _, path = part.partition("=")
        return name, Path(path)
    if not _is_table(part) and not Path(part).is_dir():
        raise DataError(f"data source {part!r} is not one of several files or folders; allowed: {_SOURCES}")
    return Path(part).stem, Path(part)
