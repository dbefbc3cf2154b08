"""A progress bar that shows the losses beside it instead of scrolling them past."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from .sampler import TaskBalancedSampler

_SHOWN = ("loss", "learning_rate", "eval_mean")


class LossProgress(ProgressCallback):
    """transformers' bar, with the newest losses as its postfix, and one bar for the evaluation of all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self._loader: DataLoader | None = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        is_new = eval_dataloader is not self._loader
        if self.prediction_bar is not None and eval_dataloader is not None and is_new:
            self.prediction_bar.total += len(eval_dataloader)
        self._loader = eval_dataloader
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = {
            name: f"{value:.4g}"
            for name, value in (logs or {}).items()
            if name in _SHOWN or (name.endswith("_loss") and not name.startswith("eval"))
        }
        if shown and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix(shown)


class SamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch.

    accelerate does so only where it finds the sampler under its own wrappers, which it does not after skipping
    batches in a distributed run.
    """

    def __init__(self) -> None:
        self.sampler: TaskBalancedSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))
