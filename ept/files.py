"""Writing files and folders so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What ``ept-train`` leaves in its output folder: PEFT's files, and in the same folder what else a user needs.
ADAPTER_FOLDER, TASKS_FILE = "adapter", "ept_tasks.json"


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a file or folder of a temporary name, then give it its own; on an error nothing is left.

    What was at ``path`` stays until the new content is on the disk, and is gone afterwards.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    replaced = path.with_name(f".{path.stem}.{os.getpid()}.old{path.suffix}")
    try:
        write(temporary)
        _sync(temporary)
        if path.is_dir():
            os.replace(path, replaced)  # a folder with content cannot be replaced, only moved aside
        os.replace(temporary, path)
    except BaseException:
        if replaced.is_dir() and not path.exists():
            os.replace(replaced, path)
        raise
    finally:
        for left in (temporary, replaced):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    _sync_one(path.parent)
    return path


def _sync(path: Path) -> None:
    """Have a file, or a folder with all that is in it, written to the disk and not only promised."""
    for entry in path.rglob("*") if path.is_dir() else ():
        _sync_one(entry)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, content: Any) -> Path:
    """Write ``content`` as strict JSON; numbers that are not finite become null."""
    text = json.dumps(_strict(content), indent=1, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number too long to read, nested too deeply
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
