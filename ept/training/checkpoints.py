"""Finding a checkpoint to resume from."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ept.files import read_json

_NAME = re.compile(r"checkpoint-(\d+)")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The complete ``checkpoint-<step>`` of the most steps, or None.

    The trainer writes its state file last: a checkpoint without a readable one was cut off while being written.
    """
    found = [
        (int(match[1]), path) for path in Path(folder).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return next((path for _, path in sorted(found, reverse=True) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        return "global_step" in read_json(checkpoint / TRAINER_STATE_NAME)
    except (FileNotFoundError, ValueError):
        return False
