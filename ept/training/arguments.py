"""``EPTTrainingArguments``: the recipe's defaults, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from ..pyramid.optim import GATE_LR_RATIO, KERNEL_LR_RATIO
from ..trainers import TASK_BATCHING
from .finite import NAN_POLICIES


@dataclass
class EPTTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with EPT's recipe as defaults and the options of multi-task training.

    Args (beyond those of transformers):
        kernel_lr_ratio: learning rate of the deconvolution kernels relative to ``learning_rate``; EPT adapters only.
        gate_lr_ratio: that of the gates, divided by the width of a task embedding (``ept.parameter_groups``).
        task_batching: ``mixed`` draws the task of every sample, ``single`` that of every batch (of all
            processes together).
        max_length: tokens of a row at most.
        max_new_tokens: length limit of a generated answer (text-to-label models under evaluation).
        eval_limit: score this many validation rows a task at most; None: all.
        nan_policy: what to do with a step whose loss or gradient is not finite: ``stop`` with an error that names the
            tasks and the layer, or ``skip`` it, count it in the log and go on (not with DeepSpeed, which hides the
            gradients). Either way no such step is applied or saved.

    ``logging_nan_inf_filter`` is off with ``stop``, where it could only cost: two host synchronisations a batch.
    ``metric_for_best_model`` is the mean of the tasks' headline metrics (``mean``) if ``load_best_model_at_end`` is
    set.

    Raises:
        ValueError: an option out of its range.
    """

    learning_rate: float = 1.5e-3
    warmup_steps: float = 0.06  # below 1: share of all steps
    num_train_epochs: float = 5.0  # TaskBalancedSampler says how long one is
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    logging_steps: float = 10
    logging_first_step: bool = True
    remove_unused_columns: bool = False  # the collators need all columns
    ddp_find_unused_parameters: bool | None = False  # every expert gets a gradient in every step, if only zeros
    kernel_lr_ratio: float = KERNEL_LR_RATIO
    gate_lr_ratio: float = GATE_LR_RATIO
    task_batching: str = TASK_BATCHING[0]
    max_length: int = 128
    max_new_tokens: int = 16
    eval_limit: int | None = None
    nan_policy: str = NAN_POLICIES[0]

    def __post_init__(self) -> None:
        if self.task_batching not in TASK_BATCHING:
            raise ValueError(f"task_batching must be one of {', '.join(TASK_BATCHING)}, got {self.task_batching!r}")
        if self.nan_policy not in NAN_POLICIES:
            raise ValueError(f"nan_policy must be one of {', '.join(NAN_POLICIES)}, got {self.nan_policy!r}")
        if self.nan_policy == "stop":
            self.logging_nan_inf_filter = False
        for name in ("kernel_lr_ratio", "gate_lr_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a number > 0, got {getattr(self, name)!r}")
        for name, least in (("max_length", 8), ("max_new_tokens", 1), ("eval_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: rows are text, which no model's forward takes")
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "mean"
        if not torch.accelerator.is_available():
            self.use_cpu = True  # left out, accelerate would take each process of torchrun for the only one
        super().__post_init__()
