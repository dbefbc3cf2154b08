"""``check_rows``: try whether a model gives every row of a mixed batch its own task's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layer_adapter import LayerAdapter
from .tuner.calls import batch_size
from .tuner.layer import EPTLinearLayer
from .tuner.model import EPTModel, ept_model

#: The name, among the layers, of what the model itself returns.
OUTPUT = "output"


def check_rows(
    model: nn.Module,
    batch: Mapping[str, Any],
    task_ids: Sequence[int] | None = None,
    *,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Run a batch of several tasks, then each of its samples alone, and name the layers that differ.

    Runs in evaluation mode, without gradients, with random values in the adapter, whose own are restored afterwards. A
    layer differs where a row of its output for a sample alone is not among the rows of its output for the batch. Of
    several layers that differ, the first is the cause.

    Args:
        model: from ``peft.get_peft_model`` with a config of this package.
        batch: arguments of its forward, without task ids.
        task_ids: one for each sample; default: the tasks in turn.
        samples: the arguments for each sample alone; default: its part of every tensor that is as long as the batch.

    Returns:
        ``{layer: largest difference}`` in the order of their calls, "output" last; empty where all is right.

    Raises:
        ValueError: fewer than two samples or tasks; a layer that refuses the batch, by name; or a model that mixes
            samples itself, and gives others with one task for all, too.
    """
    tuner, size = ept_model(model), batch_size((), dict(batch))
    tasks = min(shared.num_tasks for shared in tuner.ept_task_tables.values())
    if size is None or size < 2 or tasks < 2:
        raise ValueError(f"batch must hold at least 2 samples for an adapter of 2 tasks, got {size} for {tasks} tasks")
    ids = [sample % tasks for sample in range(size)] if task_ids is None else list(task_ids)
    if len(ids) != size:
        raise ValueError(f"task_ids must hold one id for each of the {size} samples, got {len(ids)}")
    alone = samples or [_part(batch, sample, size) for sample in range(size)]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _random_adapter(tuner):
            same = _differences(model, tuner, batch, alone, ids[0])
            if OUTPUT in same:
                raise ValueError(
                    f"batch: with one task for all, {type(tuner.model).__name__} gives a sample alone another result "
                    f"than among others (by {same[OUTPUT]:.1e}), so that rows of tasks cannot be compared"
                )
            found = _differences(model, tuner, batch, alone, ids)
    finally:
        model.train(was_training)
    return {name: value for name, value in found.items() if name not in same}


def _part(batch: Mapping[str, Any], sample: int, size: int) -> dict[str, Any]:
    own = slice(sample, sample + 1)
    return {
        name: value[own] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for name, value in batch.items()
    }


@contextmanager
def _random_adapter(tuner: EPTModel) -> Iterator[None]:
    """Make every task's update large enough to be seen; a fresh adapter has none."""
    parts = [module for module in tuner.modules() if isinstance(module, LayerAdapter)]
    parameters = {id(p): p for part in (*parts, tuner.ept_task_tables) for p in part.parameters()}
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter, _ in kept:
            parameter.normal_(0, 0.3)
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.copy_(values)


def _differences(
    model: nn.Module,
    tuner: EPTModel,
    batch: Mapping[str, Any],
    alone: Sequence[Mapping[str, Any]],
    ids: int | list[int],
) -> dict[str, float]:
    together = _run(model, tuner, batch, ids)
    tasks = [ids] * len(alone) if isinstance(ids, int) else ids
    each = [_run(model, tuner, own, task) for own, task in zip(alone, tasks, strict=True)]
    found = {}
    for name, rows in together.items():
        wanted = torch.cat([own[name] for own in each if name in own])
        scale = max(1.0, float(wanted.abs().max()))
        distance = max((float(_distance(part, rows)) for part in wanted.split(256)), default=0.0)
        if distance > torch.finfo(rows.dtype).eps ** 0.5 * scale:
            found[name] = distance
    return found


def _distance(wanted: Tensor, rows: Tensor) -> Tensor:
    """How far the farthest of some rows is from the nearest of others."""
    nearest = [torch.stack([(row - part).abs().amax(-1).min() for part in rows.split(4096)]).min() for row in wanted]
    return torch.stack(nearest).max()


def _run(model: nn.Module, tuner: EPTModel, batch: Mapping[str, Any], task_ids: Any) -> dict[str, Tensor]:
    """The rows that every adapted layer gave, ``[rows, out]``, and the model itself."""
    found: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found.setdefault(name, []).append(output.detach().flatten(0, -2))

        return hook

    layers = [(name, part) for name, part in tuner.model.named_modules() if isinstance(part, EPTLinearLayer)]
    handles = [part.register_forward_hook(watch(name)) for name, part in layers]
    try:
        output = model(**batch, task_ids=task_ids)
    finally:
        for handle in handles:
            handle.remove()
    values = output if isinstance(output, Tensor) else next(_tensors(output))
    return {**{name: torch.cat(rows) for name, rows in found.items()}, OUTPUT: values.detach().flatten(1)}


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors with a batch in a model's output, the first one first."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else []
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
            yield value
        elif not isinstance(value, Tensor):
            yield from _tensors(value)
