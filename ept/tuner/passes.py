"""The tasks of a forward pass or a generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.decorators import skip_code

from ..context import current
from ..tasks import wants_auto
from .calls import batch_size

if TYPE_CHECKING:
    from .model import EPTModel


class NameResolver:
    """A forward pre-hook of a ``PeftModel``: ids in place of names and lists, before anything that is compiled.

    ``torch.compile`` takes strings and lists for constants and would compile anew for every batch. It leaves the hooks
    of the module it is given to Python, whose frames it would compile by themselves: this one is left out of that.
    """

    def __init__(self, tuner: EPTModel) -> None:
        self.tuner = tuner

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or not isinstance(kwargs.get("task_ids"), (str, list, tuple)):
            return None
        return args, {**kwargs, "task_ids": _resolved(self.tuner, kwargs["task_ids"])}


skip_code(NameResolver.__call__.__code__)


@torch.compiler.disable
def _resolved(tuner: EPTModel, task_ids: Any) -> Any:
    by_token = isinstance(task_ids, (list, tuple)) and any(isinstance(task, (list, tuple)) for task in task_ids)
    resolved = None if by_token or wants_auto(task_ids) else tuner.resolve_tasks(task_ids)
    return task_ids if resolved is None else resolved


class TaskGenerate:
    """``generate`` of an adapted model: keeps ``task_ids`` away from transformers, which would refuse the keyword.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.
    """

    def __init__(self, model: Any, tuner: EPTModel) -> None:
        self.model, self.tuner = model, tuner

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        generate: Any = type(self.model).generate
        outer = current()
        if task_ids is None and outer is not None and wants_auto(outer.task_ids):
            task_ids = outer.task_ids  # decided here by the prompt, not by every pass anew
        if task_ids is None and self.tuner.routes_by_task:  # an outer ept.use_tasks may give them; forward checks
            return generate(self.model, *args, **kwargs)
        inputs = {**kwargs, "input_ids": kwargs.get("input_ids", kwargs.get("inputs"))}
        task_ids = self.tuner.find_out(task_ids, args, inputs)
        batch, times = batch_size(args, inputs), self._copies(kwargs)
        with self.tuner.generating(task_ids, batch, kwargs.get("attention_mask"), times):
            return generate(self.model, *args, **kwargs)

    def _copies(self, kwargs: dict[str, Any]) -> int:
        """How many rows ``generate`` will make of every sample."""
        configs = (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        counts = []
        for name in ("num_beams", "num_return_sequences"):
            given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            counts.append(next((value for value in given if isinstance(value, int)), 1))
        return max(counts)
