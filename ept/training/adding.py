"""A task for an adapter that has been trained on others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from ept.data import TaskSpec
from ept.training.inspection import base_model
from ept.training.multitask import MultiTaskEncoder, check_specs


def add_task(
    model: PeftModel, spec: TaskSpec, *, like: int | str | None = None, new_kernels: Sequence[int] = ()
) -> int:
    """Add a task to a trained model: an embedding to its EPT adapter and, to a ``MultiTaskEncoder``, a head.

    Only these train afterwards; every other task's output stays as it is, to the bit. Make trainer and optimizer after
    the call: ``EPTTrainer(model, arguments, tasks=[the new task's data], ...)``.

    Args:
        like, new_kernels: as in ``model.add_task`` of the adapter: the task whose embedding it starts from (None: the
            mean of all), and experts of its own.

    Returns:
        The new task's id.

    Raises:
        ValueError: as ``model.add_task`` of the adapter, or a task that a head cannot learn; nothing has changed then.
    """
    base: Any = base_model(model)
    tuner: Any = model.base_model
    if not isinstance(base, MultiTaskEncoder):
        return tuner.add_task(spec.name, like=like, new_kernels=new_kernels)
    check_specs([*base.specs, spec])
    task = tuner.append_task(spec.name, like, new_kernels)
    base.add_task(spec)
    return task
