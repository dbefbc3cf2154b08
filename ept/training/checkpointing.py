"""The trainer that writes checkpoints which are complete or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ept.files import WriteError, is_write_failure
from ept.training.checkpoints import (
    UNFINISHED,
    clear_unfinished,
    finish_checkpoint,
    newest_checkpoint,
    rotate_checkpoints,
)
from ept.training.finite import refuse_nonfinite

if TYPE_CHECKING:
    from ept.training.arguments import EPTTrainingArguments


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
