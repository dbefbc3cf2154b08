"""Checkpoint folders: which are complete, how one gets its name, how old ones go.

A checkpoint is written in the folder ``_unfinished`` beside the others and moved out by one rename when all of it is on
the disk; it is deleted the other way round. So a killed process leaves half a checkpoint there and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ept.files import read_json, sync_to_disk, write_json

#: Where checkpoints are written; of a name that transformers does not upload.
UNFINISHED = "_unfinished"
#: Written into a checkpoint last: its other files and their SHA-256 sums.
MANIFEST = "ept_checkpoint.json"

_NAME = re.compile(r"checkpoint-(\d+)")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The complete ``checkpoint-<step>`` of the most steps, or None.

    One that lacks a file, or has one of another content than was written, is no complete one: a copy that broke off, a
    disk that forgets.
    """
    return next((path for path in reversed(_checkpoints(folder)) if _is_complete(path)), None)


def finish_checkpoint(written: Path, path: Path) -> None:
    """Move a checkpoint that has been written to its name, in place of what is there.

    Args:
        written: the folder in ``_unfinished``.
        path: ``checkpoint-<step>``.
    """
    sums = {file.relative_to(written).as_posix(): _sum(file) for file in written.rglob("*") if file.is_file()}
    write_json(written / MANIFEST, {"sha256": sums})
    sync_to_disk(written)
    if path.exists():
        remove_checkpoint(path)
    os.replace(written, path)
    sync_to_disk(path.parent, contents=False)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever seen under its name."""
    doomed = path.parent / UNFINISHED / f"{path.name}.removed"
    doomed.parent.mkdir(exist_ok=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def rotate_checkpoints(folder: str | Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete the checkpoints of the fewest steps until ``limit`` are left (None: no limit), but none of ``keep``."""
    found = _checkpoints(folder)
    removable = [path for path in found if path not in keep]
    for path in removable[: max(0, len(found) - limit)] if limit else ():
        remove_checkpoint(path)


def clear_unfinished(folder: str | Path) -> None:
    """Remove what is left of checkpoints that were being written or deleted when a process was killed."""
    shutil.rmtree(Path(folder) / UNFINISHED, ignore_errors=True)


def _checkpoints(folder: str | Path) -> list[Path]:
    """Every ``checkpoint-<step>``, fewest steps first."""
    found = [(int(m[1]), path) for path in Path(folder).glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _is_complete(checkpoint: Path) -> bool:
    try:
        sums = read_json(checkpoint / MANIFEST)["sha256"]
        return all(_sum(checkpoint / name) == found for name, found in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
