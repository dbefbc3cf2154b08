"""``EPTTrainer``: balanced multi-task training of an adapter with transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalPrediction

from ..data import TaskData
from ..trainers import EPTTrainerMixin, SamplerEpoch
from .arguments import EPTTrainingArguments
from .checkpointing import CheckpointingTrainer
from .collator import TaskRows, evaluation_rows, make_collator, training_rows
from .evaluate import mean_headline, predict_batch, task_metrics
from .finite import FiniteSteps
from .multitask import MultiTaskEncoder, base_model, ids_of_tasks, model_kind, takes_task_ids
from .report import LossProgress

__all__ = ["EPTTrainer", "SamplerEpoch"]

#: Options of ``Trainer`` that have no effect here, and their only value.
_UNSERVED = {
    "train_sampling_strategy": "random",
    "prediction_loss_only": False,
    "batch_eval_metrics": False,
    "include_for_metrics": [],
}


class EPTTrainer(EPTTrainerMixin, CheckpointingTrainer):
    """Trains one adapter on several tasks, each drawn with probability 1/T.

    The total loss is the model's own loss plus the method's (``ept.auxiliary_losses``; for EPT ``contrastive_weight``
    times the contrastive task loss); the log has ``loss``, ``task_loss`` and each of the method's losses, unweighted
    (``contrastive_loss``). Evaluation gives ``eval_<task>_<metric>`` for every task, ``eval_<task>_unparseable`` for
    text-to-label models, and ``eval_mean``, the mean headline metric. Any other PEFT adapter, or none, trains the same
    way without such a loss. A checkpoint is complete or not there (``newest_checkpoint``), whenever the process is
    killed.

    Plain ``train_dataset``, ``eval_dataset`` and ``data_collator`` serve as well as ``tasks``: what ``EPTTrainerMixin``
    says of them holds, evaluation then gives losses.

    Args:
        model: a MultiTaskEncoder, seq2seq or causal language model, with its adapter; with plain datasets, any.
        args: recipe and options.
        tasks: what to train and evaluate on. A task's id is its place among the model's tasks (heads, or
            ``task_names`` of the adapter), or in this sequence where the model names none. None: plain datasets.
        processing_class: the model's tokenizer; needed with ``tasks``.
        **options: further arguments of ``transformers.Trainer``.

    Raises:
        ValueError: the tasks do not fit the model, an option that is not served, or one process sees several GPUs.
        TypeError: the model is of no supported kind, or an argument that does not go with ``tasks``.
    """

    args: EPTTrainingArguments
    model: Any  # of any library
    train_dataset: Any  # TaskRows, or a plain one
    eval_dataset: Any
    data_collator: Any
    optimizer: Any
    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module,
        args: EPTTrainingArguments,
        *,
        tasks: Sequence[TaskData] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        if args.label_smoothing_factor and isinstance(base_model(model), MultiTaskEncoder):
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, which a MultiTaskEncoder does "
                "not serve; set it to 0"
            )
        self._takes_task_ids = takes_task_ids(model)
        self._finite_steps = FiniteSteps(self)
        self._step: dict[str, Tensor] = {}  # losses of the step under way; those of the steps since the last log entry
        self._sums: dict[str, Tensor] = {}
        self._summed = self._skipped = 0
        self._names: dict[int, str] = {}
        self._has_tasks = tasks is not None
        if tasks is not None:
            options |= self._of_tasks(model, args, tasks, processing_class, options)
        super().__init__(model=model, args=args, processing_class=processing_class, **options)
        self.add_callback(self._finite_steps)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossProgress)
        self.remove_callback(PrinterCallback)

    def _of_tasks(
        self,
        model: nn.Module,
        args: EPTTrainingArguments,
        tasks: Sequence[TaskData],
        processing_class: PreTrainedTokenizerBase | None,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """``Trainer``'s arguments for these tasks."""
        if processing_class is None:
            raise TypeError("processing_class is missing: tasks are texts, which need the model's tokenizer")
        for name, only in _UNSERVED.items():
            if (value := getattr(args, name, only)) != only:
                raise ValueError(f"{name} is {value!r}, which is not served with tasks; leave it at {only!r}")
        ids = ids_of_tasks(model, tasks)
        specs = {task_id: task.spec for task_id, task in zip(ids, tasks, strict=True)}
        self._generates = model_kind(model) != "encoder"
        self._specs = {spec.name: spec for spec in specs.values()}
        self._names = {task_id: spec.name for task_id, spec in specs.items()}
        self._evaluated = tasks[0].spec
        train_collator, self._eval_collator = (
            make_collator(model_kind(model), processing_class, specs, max_length=args.max_length, generate=generate)
            for generate in (False, self._generates)
        )
        evaluated = {
            task.spec.name: evaluation_rows(task, i, args.eval_limit) for i, task in zip(ids, tasks, strict=True)
        }
        made = {
            "data_collator": train_collator,
            "train_dataset": training_rows(tasks, ids),
            "eval_dataset": evaluated,
            "compute_metrics": self._task_metrics,
        }
        if both := sorted(made.keys() & options.keys()):
            raise TypeError(f"{both[0]} is given beside tasks, which make their own; give one of them")
        return made

    # ---- data

    def _places(self, rows: Any) -> tuple[Sequence[int], np.ndarray | None] | None:
        return (rows.sizes, None) if isinstance(rows, TaskRows) else super()._places(rows)

    def get_eval_dataloader(self, eval_dataset: str | TaskRows | None = None) -> torch.utils.data.DataLoader:
        """As in ``Trainer``, with prompts instead of prompts and answers for text-to-label models."""
        if not self._has_tasks:
            return super().get_eval_dataloader(eval_dataset)
        train_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    # ---- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As ``EPTTrainerMixin.compute_loss``; whether the loss is finite is looked at before the step is taken."""
        found = super().compute_loss(model, self.model_inputs(inputs), return_outputs, num_items_in_batch)
        if self.model.training:
            self._finite_steps.see(inputs, found[0] if return_outputs else found)
        return found

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the model takes it: with ``task_ids``, if it has a use for them."""
        return inputs if self._takes_task_ids else {name: v for name, v in inputs.items() if name != "task_ids"}

    def task_name(self, task_id: int) -> str:
        """The name of a task of this trainer."""
        names = None if self._adapter_config is None else self._adapter_config.task_names
        return self._names.get(task_id) or (names[task_id] if names else str(task_id))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in ``Trainer``; training entries get the parts of the loss, averaged over the steps since the last one.

        ``skipped_steps`` counts the steps since the last entry that ``nan_policy="skip"`` left out, if there are any.
        """
        if "loss" in logs:
            for name, total in self._sums.items():
                logs[name] = self.accelerator.reduce(total, "mean").item() / self._summed
            if self._skipped:
                logs["skipped_steps"] = self._skipped
            self._sums = {}
            self._summed = self._skipped = 0
        super().log(logs, start_time)

    def end_step(self, *, skipped: bool = False) -> None:
        """Count the losses of the step under way for the log or, of one that is left out, forget them."""
        if skipped:
            self._skipped += 1
        else:
            self._summed += 1
            for name, value in self._step.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._step = {}

    def _note_loss(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._step[name] = self._step[name] + value if name in self._step else value

    # ---- evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the named tasks (None: all), ``<prefix>_<task>_<metric>``, and their mean, ``<prefix>_mean``.

        Raises:
            ValueError: a task that this trainer does not have.
        """
        if not self._has_tasks:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        names = list(self._specs) if eval_dataset is None else list(eval_dataset)
        start = time.time()
        by_task = self.evaluate_by_task(names, metric_key_prefix)
        logged = {
            f"{metric_key_prefix}_{name}_{key}": value
            for name, found in by_task.items()
            for key, value in found.items()
        }
        logged[f"{metric_key_prefix}_mean"] = mean_headline([self._specs[name] for name in names], by_task)
        logged[f"{metric_key_prefix}_runtime"] = time.time() - start
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged

    def evaluate_by_task(
        self, names: Sequence[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, dict[str, float]]:
        """``{task: {metric: value}}`` of the named tasks (None: all), not logged; ``loss`` is among the metrics."""
        names = list(self._specs) if names is None else names
        if not names or any(name not in self._specs for name in names):
            raise ValueError(f"evaluation of the tasks {names}; name some of: {', '.join(self._specs)}")
        by_task = {}
        for name in names:
            self._evaluated = self._specs[name]
            loader = self.get_eval_dataloader(name)
            output = self.evaluation_loop(loader, f"Evaluation of {name}", metric_key_prefix=metric_key_prefix)
            metrics = output.metrics or {}
            found = {key.removeprefix(f"{metric_key_prefix}_"): value for key, value in metrics.items()}
            found.pop("model_preparation_time", None)
            by_task[name] = found
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, by_task)
        return by_task

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Predictions, with losses unless answers are generated, and labels; all ``[batch]``.

        No mean loss: ``Trainer``'s mean over batches would count twice the samples that fill up the last batches of a
        distributed run, while it takes them out of what is returned here.
        """
        if not self._has_tasks:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        tokenizer: Any = self.processing_class
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            predictions, losses = predict_batch(
                self.model, inputs, self._evaluated, tokenizer, max_new_tokens=self.args.max_new_tokens
            )
        return None, predictions if losses is None else (predictions, losses), inputs["labels"]

    def _task_metrics(self, results: EvalPrediction) -> dict[str, float]:
        labels: Any = results.label_ids  # one array each, as prediction_step gives
        found: Any = results.predictions
        if self._generates:
            return task_metrics(self._evaluated, found, labels, generated=True)
        predictions, losses = found
        return {"loss": float(losses.mean()), **task_metrics(self._evaluated, predictions, labels, generated=False)}
