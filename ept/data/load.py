"""One door to all data sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .folder import load_folder
from .hub import PREFIX, load_hub
from .sentiment import load_sentiment
from .spec import DataError, TaskData

_SOURCES = "'sentiment' (the default), a folder with an index.json, or 'hub:<dataset id>'"


def load_tasks(
    source: str = "sentiment", tasks: Sequence[str] | None = None, *, cache_dir: str | Path | None = None
) -> list[TaskData]:
    """Load tasks, checked and in common columns.

    Args:
        source: ``sentiment``, a folder (`ept.data.folder`; write ``./sentiment`` for one of that name), or
            ``hub:<dataset id>`` (`ept.data.hub`).
        tasks: names in the wanted order; None means all.
        cache_dir: where downloads are kept; None means ``$EPT_CACHE`` or the user's cache folder for ``sentiment`` and
            the `datasets` library's own cache for the hub.

    Raises:
        DataError: see `load_sentiment`, `load_folder`, `load_hub`.
    """
    if source == "sentiment":
        return load_sentiment(tasks, cache_dir=cache_dir)
    if source.startswith(PREFIX):
        return load_hub(source.removeprefix(PREFIX), tasks, cache_dir=cache_dir)
    if not Path(source).is_dir():
        raise DataError(f"data source {source!r} is not a directory; allowed: {_SOURCES}")
    return load_folder(source, tasks)
