"""``EPTTrainer``: balanced multi-task training of an adapter with transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput

from ..config import EPTConfig
from ..data import TaskData
from ..losses import auxiliary_losses
from ..methods import method_of
from ..pyramid.optim import parameter_groups
from ..tuner.calls import IGNORED
from ..tuner.model import ept_model
from .arguments import EPTTrainingArguments
from .checkpointing import CheckpointingTrainer
from .collator import TaskBalancedSampler, TaskRows, evaluation_rows, make_collator, training_rows
from .evaluate import mean_headline, predict_batch, task_metrics
from .finite import FiniteSteps
from .multitask import adapter_config, ids_of_tasks, model_kind, takes_task_ids
from .report import LossProgress


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


class EPTTrainer(CheckpointingTrainer):
    """Trains one adapter on several tasks, each drawn with probability 1/T.

    The total loss is the model's own loss plus the method's (``ept.auxiliary_losses``; for EPT ``contrastive_weight``
    times the contrastive task loss); the log has ``loss``, ``task_loss`` and each of the method's losses, unweighted
    (``contrastive_loss``). Evaluation gives ``eval_<task>_<metric>`` for every task, ``eval_<task>_unparseable`` for
    text-to-label models, and ``eval_mean``, the mean headline metric. Any other PEFT adapter, or none, trains the same
    way without such a loss. A checkpoint is complete or not there (``newest_checkpoint``), whenever the process is
    killed.

    Args:
        model: a MultiTaskEncoder, seq2seq or causal language model, with its adapter.
        args: recipe and options.
        tasks: what to train and evaluate on. A task's id is its place among the model's tasks (heads, or
            ``task_names`` of the adapter), or in this sequence where the model names none.
        processing_class: the model's tokenizer.
        **options: further arguments of ``transformers.Trainer``.

    Raises:
        ValueError: the tasks do not fit the model, or one process sees several GPUs.
        TypeError: the model is of no supported kind.
    """

    args: EPTTrainingArguments
    model: Any  # of any library
    train_dataset: Any  # TaskRows

    def __init__(
        self,
        model: nn.Module,
        args: EPTTrainingArguments,
        *,
        tasks: Sequence[TaskData],
        processing_class: PreTrainedTokenizerBase,
        **options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"args: {args.n_gpu} GPUs in one process would replicate the model without its method's loss; "
                "start one process per GPU with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES"
            )
        ids = ids_of_tasks(model, tasks)
        specs = {task_id: task.spec for task_id, task in zip(ids, tasks, strict=True)}
        self._generates = model_kind(model) != "encoder"
        self._takes_task_ids = takes_task_ids(model)
        self._adapter_config = adapter_config(model)
        self._specs = {spec.name: spec for spec in specs.values()}
        self._names = {task_id: spec.name for task_id, spec in specs.items()}
        self._evaluated = tasks[0].spec
        self._sampler_epoch = SamplerEpoch()
        self._finite_steps = FiniteSteps(self)
        self._step: dict[str, Tensor] = {}  # losses of the step under way; those of the steps since the last log entry
        self._sums: dict[str, Tensor] = {}
        self._summed = self._skipped = 0
        collator_options: dict[str, Any] = {"max_length": args.max_length}
        train_collator = make_collator(model_kind(model), processing_class, specs, **collator_options)
        self._eval_collator = make_collator(
            model_kind(model), processing_class, specs, generate=self._generates, **collator_options
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=train_collator,
            train_dataset=training_rows(tasks, ids),
            eval_dataset={
                task.spec.name: evaluation_rows(task, i, args.eval_limit) for i, task in zip(ids, tasks, strict=True)
            },
            processing_class=processing_class,
            compute_metrics=self._task_metrics,
            **options,
        )
        # T5 and its kin take any keyword but return the batch's mean over tokens whatever num_items_in_batch says.
        self._means_tokens = model_kind(model) == "seq2seq" and self.model_accepts_loss_kwargs
        self.add_callback(self._sampler_epoch)
        self.add_callback(self._finite_steps)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossProgress)
        self.remove_callback(PrinterCallback)

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        """As in ``Trainer``.

        Raises:
            ValueError: an adapter that cannot be sharded yet, under FSDP.
        """
        if self.is_fsdp_enabled and self._adapter_config is not None:
            for shared in ept_model(self.model).ept_task_tables.values():
                method_of(self._adapter_config).adapter.check_shardable(shared)
        return super().train(*args, **options)

    # ---- data

    def _get_train_sampler(self, train_dataset: TaskRows | None = None) -> TaskBalancedSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        sampler = self._sampler_epoch.sampler = TaskBalancedSampler(
            rows.sizes,
            self._train_batch_size,
            world_size=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            task_batching=self.args.task_batching,
        )
        return sampler

    def get_eval_dataloader(self, eval_dataset: str | TaskRows | None = None) -> torch.utils.data.DataLoader:
        """As in ``Trainer``, with prompts instead of prompts and answers for text-to-label models."""
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
    ) -> Tensor | tuple[Tensor, Any]:
        """Task loss plus the method's weighted losses, with ``Trainer``'s rules for gradient accumulation.

        Every sample, or in a language model every answer token, of a step counts alike, however the step's batch is
        divided among accumulated batches and processes.
        """
        loss, outputs = super().compute_loss(model, self.model_inputs(inputs), True, num_items_in_batch)
        # A loss over num_items_in_batch is a share of the accumulated batch's; a batch mean is yet to be divided.
        accumulated = self.current_gradient_accumulation_steps
        is_share = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if is_share and num_items_in_batch is not None and self._means_tokens:
            loss = loss * (inputs["labels"] != IGNORED).sum() / num_items_in_batch
        self._add_to_log("task_loss", loss if is_share else loss / accumulated)
        if self._adapter_config is not None:
            for name, (weight, value) in auxiliary_losses(self.model).items():
                self._add_to_log(name, value / accumulated)
                loss = loss + weight * value / (accumulated if is_share else 1)
        self._finite_steps.see(inputs, loss)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of ``args.optim``, over ``ept.parameter_groups`` if the adapter is EPT."""
        if self.optimizer is None and isinstance(self._adapter_config, EPTConfig):
            trained: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(
                trained,
                self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                kernel_lr_ratio=self.args.kernel_lr_ratio,
                gate_lr_ratio=self.args.gate_lr_ratio,
            )
            self.optimizer = optimizer_class(groups, **options)
        # Without an argument where there is none: transformers 5.0 takes no model.
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the model takes it: with ``task_ids``, if it has a use for them."""
        return inputs if self._takes_task_ids else {name: v for name, v in inputs.items() if name != "task_ids"}

    def task_name(self, task_id: int) -> str:
        """The name of a task of this trainer."""
        return self._names[task_id]

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

    def _add_to_log(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._step[name] = self._step[name] + value if name in self._step else value

    # ---- evaluation

    def evaluate(
        self,
        eval_dataset: Sequence[str] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the named tasks (None: all), ``<prefix>_<task>_<metric>``, and their mean, ``<prefix>_mean``.

        Raises:
            ValueError: a task that this trainer does not have.
        """
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
    ) -> tuple[None, Tensor | tuple[Tensor, Tensor], Tensor]:
        """Predictions, with losses unless answers are generated, and labels; all ``[batch]``.

        No mean loss: ``Trainer``'s mean over batches would count twice the samples that fill up the last batches of a
        distributed run, while it takes them out of what is returned here.
        """
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
