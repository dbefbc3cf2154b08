"""``EPTTrainer``: balanced multi-task training of an adapter with transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalPrediction

import ept
from ept.data import TaskData
from ept.training.arguments import EPTTrainingArguments
from ept.training.collator import make_collator
from ept.training.evaluate import mean_headline, predict_batch, task_metrics
from ept.training.inspection import adapter_config, ids_of_tasks, model_kind, takes_task_ids
from ept.training.progress import LossProgress, SamplerEpoch
from ept.training.rows import TaskRows, evaluation_rows, training_rows
from ept.training.sampler import TaskBalancedSampler


class EPTTrainer(Trainer):
    """Trains one adapter on several tasks, each drawn with probability 1/T.

    The total loss is the model's own loss plus the method's (``ept.auxiliary_losses``; for EPT ``contrastive_weight``
    times the contrastive task loss); the log has ``loss``, ``task_loss`` and each of the method's losses, unweighted
    (``contrastive_loss``). Evaluation gives
    ``eval_<task>_<metric>`` for every task, ``eval_<task>_unparseable`` for text-to-label models, and ``eval_mean``,
    the mean headline metric. Any other PEFT adapter, or none, trains the same way without such a loss.

    Args:
        model: a MultiTaskEncoder, seq2seq or causal language model, with its adapter.
        args: recipe and options.
        tasks: what to train and evaluate on. A task's id is its place among the model's tasks (heads, or
        ``task_names`` of
            the adapter), or in this sequence where the model names none.
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
        self._evaluated = tasks[0].spec
        self._sampler_epoch = SamplerEpoch()
        self._sums: dict[str, Tensor] = {}
        self._summed_from = 0
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
        if model_kind(model) == "seq2seq":
            # T5 and its kin take any keyword but return the batch mean whatever num_items_in_batch says; Trainer would
            # then not divide by the accumulation steps.
            self.model_accepts_loss_kwargs = False
        self.add_callback(self._sampler_epoch)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossProgress)
        self.remove_callback(PrinterCallback)

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
        """Task loss plus the method's weighted losses, with ``Trainer``'s rules for gradient accumulation."""
        if not self._takes_task_ids:
            inputs = {name: value for name, value in inputs.items() if name != "task_ids"}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # A loss over num_items_in_batch is a share of the accumulated batch's; a batch mean is yet to be divided.
        accumulated = self.current_gradient_accumulation_steps
        is_share = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        self._add_to_log("task_loss", loss if is_share else loss / accumulated)
        if self._adapter_config is not None:
            for name, (weight, value) in ept.auxiliary_losses(self.model).items():
                self._add_to_log(name, value / accumulated)
                loss = loss + weight * value / (accumulated if is_share else 1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of ``args.optim``, over ``ept.parameter_groups`` if the adapter is EPT."""
        if self.optimizer is None and isinstance(self._adapter_config, ept.EPTConfig):
            trained: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = ept.parameter_groups(
                trained,
                self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                kernel_lr_ratio=self.args.kernel_lr_ratio,
                gate_lr_ratio=self.args.gate_lr_ratio,
            )
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in ``Trainer``; training entries get the parts of the loss, averaged over the steps since the last one."""
        steps = self.state.global_step - self._summed_from
        if "loss" in logs and steps > 0:
            for name, total in self._sums.items():
                logs[name] = self.accelerator.reduce(total, "mean").item() / steps
            self._sums.clear()
            self._summed_from = self.state.global_step
        super().log(logs, start_time)

    def _add_to_log(self, name: str, value: Tensor) -> None:
        if not self._sums:
            self._summed_from = self.state.global_step
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

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
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Loss (None where answers are generated), predictions and labels, both ``[batch]``."""
        inputs = self._prepare_inputs(inputs)
        tokenizer: Any = self.processing_class
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            loss, predictions = predict_batch(
                self.model, inputs, self._evaluated, tokenizer, max_new_tokens=self.args.max_new_tokens
            )
        return loss, predictions, inputs["labels"]

    def _task_metrics(self, results: EvalPrediction) -> dict[str, float]:
        predictions: Any = results.predictions  # one array each, as prediction_step gives
        labels: Any = results.label_ids
        return task_metrics(self._evaluated, predictions, labels, generated=self._generates)
