"""Writing files and folders so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

#: What ``ept-train`` leaves in its output folder: PEFT's files, and in the same folder what else a user needs.
ADAPTER_FOLDER, TASKS_FILE = "adapter", "ept_tasks.json"


_LEFTOVER = re.compile(r"\.(?P<stem>.+)\.\d+\.(?P<kind>tmp|old)(?P<suffix>(\.[^.]+)?)")


class WriteError(OSError):
    """Something could not be written: a full disk, a folder without write permission, a file where a folder belongs."""

    def __init__(self, path: str | Path, error: BaseException) -> None:
        if isinstance(error, WriteError):  # of a file in the folder that is named here
            error = error.__cause__ or error
        super().__init__(f"cannot write {str(path)!r}: {error}; what was there before is unchanged")
        self.errno = getattr(error, "errno", None)


def is_write_failure(error: BaseException) -> bool:
    """Whether an error may be the disk's: safetensors, ``torch.save`` and tokenizers each raise one of their own."""
    return isinstance(error, (OSError, SafetensorError)) or type(error) in (RuntimeError, Exception)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a file or folder of a temporary name, then give it its own; on an error nothing is left.

    What was at ``path`` stays until the new content is on the disk, and is gone afterwards; a link stays, and what it
    points to is replaced. A process that is killed may leave the temporary one behind, see ``clear_leftovers``.

    Raises:
        WriteError: the disk is full, the folder cannot be written to, or a file is to take a folder's place.
    """
    given, path = Path(path), Path(path)
    if path.is_symlink():
        path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    replaced = path.with_name(f".{path.stem}.{os.getpid()}.old{path.suffix}")
    try:
        write(temporary)
        sync_to_disk(temporary)
        if path.is_dir():
            if not temporary.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder is there, and a file is to be written")
            os.replace(path, replaced)  # a folder with content cannot be replaced, only moved aside
        os.replace(temporary, path)
    except BaseException as error:
        if replaced.is_dir() and not path.exists():
            os.replace(replaced, path)
        if is_write_failure(error):
            raise WriteError(path, error) from error
        raise
    finally:
        for left in (temporary, replaced):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    sync_to_disk(path.parent, contents=False)
    return given


def clear_leftovers(folder: str | Path) -> None:
    """Remove what killed calls of ``write_atomically`` left in ``folder``, to which nobody else may be writing.

    A folder that one of them had moved aside, and not yet replaced, gets its name back.
    """
    for left in list(Path(folder).glob(".*")):
        match = _LEFTOVER.fullmatch(left.name)
        if match is None:
            continue
        path = left.with_name(match["stem"] + match["suffix"])
        if match["kind"] == "old" and not path.exists():
            os.replace(left, path)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def sync_to_disk(path: Path, *, contents: bool = True) -> None:
    """Have a file, or a folder with all that is in it, written to the disk and not only promised.

    Args:
        contents: False: of a folder, only the names of what is in it.
    """
    for one in [*(path.rglob("*") if contents and path.is_dir() else ()), path]:
        if one.is_dir() and os.name == "nt":
            continue  # Windows opens no folders
        descriptor = os.open(one, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
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
