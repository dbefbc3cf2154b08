"""Checkpoints that are complete or not there: their folders, and the trainer that writes them.

A checkpoint is written in the folder ``_unfinished`` beside the others and moved out by one rename when all of it is on
the disk; it is deleted the other way round. So a killed process leaves half a checkpoint there and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import WriteError, is_write_failure, read_json, sync_to_disk, write_json
from .arguments import EPTTrainingArguments
from .finite import refuse_nonfinite

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


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the checkpoint that cannot be written, whatever the error is called that says so."""
    try:
        yield
    except Exception as error:
        if is_write_failure(error):
            raise WriteError(path, error) from error
        raise


class CheckpointingTrainer(Trainer):
    """transformers' Trainer, whose processes write a checkpoint in a folder of its own, which the main one then moves.

    transformers writes ``checkpoint-<step>`` in place, so that a process killed meanwhile leaves half of one.
    """

    args: EPTTrainingArguments
    model: Any  # of any library
    _unfinished = False  # whether a checkpoint is being written

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As in ``Trainer``; True resumes from the newest complete checkpoint in ``args.output_dir``.

        Raises:
            ValueError: there is none.
            WriteError: a checkpoint cannot be written; earlier ones are intact.
            FloatingPointError: a weight to be saved is not finite.
        """
        output_dir: Any = self.args.output_dir  # set, whatever transformers declares
        if self.args.should_save:
            clear_unfinished(output_dir)
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(output_dir)
            if newest is None:
                raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {str(self.args.output_dir)!r}")
            resume_from_checkpoint = str(newest)
        return super().train(resume_from_checkpoint, *args, **options)

    def get_batch_samples(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
        """As in ``Trainer``; nothing where the run to resume was through: ``Trainer`` would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **options)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self._unfinished else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        refuse_nonfinite(self.model)
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, path = folder / UNFINISHED / name, folder / name
        self._unfinished = True
        try:
            with _writing(path):
                super()._save_checkpoint(model, trial)
            self._name_best(folder)
            self.accelerator.wait_for_everyone()  # raises an error of the network where another process could not write
            if self.args.should_save:
                with _writing(path):
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                    finish_checkpoint(written, path)
                    keep = {path, Path(self.state.best_model_checkpoint or path)}
                    rotate_checkpoints(folder, self.args.save_total_limit, keep)
        finally:
            self._unfinished = False
            if self.args.should_save:
                clear_unfinished(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(path))

    def _name_best(self, folder: Path) -> None:
        """What ``Trainer`` notes of the best checkpoint, which it has looked for in the wrong folder."""
        best = self.state.best_global_step
        path = folder / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if best and (best == self.state.global_step or path.exists()):
            self.state.best_model_checkpoint = str(path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not yet: the checkpoint is about to get another name."""
