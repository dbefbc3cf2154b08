"""What a model is and takes, whichever adapter (or none) it carries."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

import ept
from ept.data import TaskData
from ept.training.multitask import MultiTaskEncoder

from ..config import AdapterConfig


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_kind(model: nn.Module) -> str:
    """``encoder`` (a MultiTaskEncoder), ``seq2seq`` or ``causal``.

    Raises:
        TypeError: none of them.
    """
    base: Any = base_model(model)
    if isinstance(base, MultiTaskEncoder):
        return "encoder"
    if not hasattr(base, "generate"):
        raise TypeError(
            f"model is a {type(base).__name__}, which neither classifies nor generates; "
            "wrap an encoder in MultiTaskEncoder"
        )
    return "seq2seq" if base.config.is_encoder_decoder else "causal"


def adapter_config(model: nn.Module) -> AdapterConfig | None:
    """The active adapter's config if it is of one of this package's methods; None for any other adapter or none."""
    if not isinstance(model, PeftModel) or not isinstance(model.active_adapter, str):
        return None
    config = model.peft_config[model.active_adapter]
    return config if isinstance(config, AdapterConfig) else None


def trained_parameters(model: PeftModel) -> dict[str, int]:
    """Trained numbers by what they are: ``ept.parameter_breakdown``, or those of another adapter and the others."""
    if adapter_config(model) is not None:
        return ept.parameter_breakdown(model)
    method: Any = model.peft_config[model.active_adapter].peft_type
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[method]
    counts = {"adapter": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["adapter" if f".{prefix}" in name else "other"] += parameter.numel()
    return counts


def takes_task_ids(model: nn.Module) -> bool:
    """Whether the adapter or the model under it has a use for ``task_ids`` (a plain LoRA on T5 has none)."""
    if adapter_config(model) is not None:
        return True
    # Not PeftModel's own forward: for language models it names task_ids whatever the adapter.
    tuner = [model.base_model] if isinstance(model, PeftModel) else []
    return any("task_ids" in inspect.signature(part.forward).parameters for part in (base_model(model), *tuner))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next(model.parameters()).device


def ids_of_tasks(model: nn.Module, tasks: Sequence[TaskData]) -> list[int]:
    """Each task's id: its place among the model's tasks, or in the given sequence where the model names none.

    Raises:
        ValueError: no task, a task twice, one that the model does not have, or heads and adapter that disagree.
    """
    names = [task.spec.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks are {names}; at least one is needed, each once")
    known = _task_names(model)
    if known is None:
        return list(range(len(names)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"tasks: the model has no task {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    return [known.index(name) for name in names]


def _task_names(model: nn.Module) -> list[str] | None:
    base, config = base_model(model), adapter_config(model)
    heads = [spec.name for spec in base.specs] if isinstance(base, MultiTaskEncoder) else None
    adapter = None if config is None or config.task_names is None else list(config.task_names)
    if heads is not None and adapter is not None and adapter[: len(heads)] != heads:
        raise ValueError(
            f"task_names of the adapter are {adapter}, but the heads are for {heads}; give both the same order"
        )
    return heads if heads is not None else adapter
