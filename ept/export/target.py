"""Where an export goes: a folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..files import write_atomically


def check_target(path: str | Path, overwrite: bool) -> Path:
    """Refuse a place that holds something, before any work.

    Raises:
        FileExistsError: a file, or a folder with content and no ``overwrite``.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"path {str(path)!r} is a file; a folder is needed")
    if path.is_symlink():
        raise FileExistsError(f"path {str(path)!r} is a link; name the folder itself")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"path {str(path)!r} is not empty; overwrite=True replaces the whole folder")
    return path


def write_folder(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill an empty folder beside ``path``, then put it there in one step."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        write(folder)

    return write_atomically(path.absolute(), fill)
