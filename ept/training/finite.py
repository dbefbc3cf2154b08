"""Optimizer steps whose loss or gradient is not finite: found before they are taken, explained, and not taken.

The check costs one host synchronisation per optimizer step, whatever the number of accumulated batches; Trainer's own
``logging_nan_inf_filter``, which looks at every batch's loss and lets the step happen, costs two per batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType, gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..saved import SHARED_MARK
from ..tasks import TaskSet

NAN_POLICIES = ("stop", "skip")

_log = logging.getLogger(__name__)

Batch = dict[str, Any]
Finding = tuple[set[int], str]  # ids of the tasks concerned, and where the value is


class Guarded(Protocol):
    """What ``FiniteSteps`` asks of a trainer, beside what transformers' has."""

    args: Any
    model: Any
    accelerator: Any

    def compute_loss_context_manager(self) -> Any: ...

    def model_inputs(self, inputs: Batch) -> Batch:
        """A batch as the model takes it."""

    def task_name(self, task_id: int) -> str:
        """What to call a task."""

    def end_step(self, *, skipped: bool = False) -> None:
        """A step has been taken, or left out."""


class FiniteSteps(TrainerCallback):
    """Stops the training, or leaves a step out, where the step's loss or gradient is not finite.

    All processes of a distributed run decide alike: what one of them finds holds for all. With a gradient scaler (fp16)
    the gradient is the scaler's business, which leaves such steps out to find its scale, and the loss counts alone.
    """

    def __init__(self, trainer: Guarded) -> None:
        self.trainer = trainer
        self._seen: list[tuple[Batch, Tensor]] = []
        self._shared: list[TaskSet] | None = None  # not looked for yet

    def see(self, inputs: Batch, loss: Tensor) -> None:
        """A batch of the step under way, with its ``task_ids``, and its loss."""
        self._seen.append((inputs, loss.detach()))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen.clear()
        if self._shared is None:
            self._shared = [module for module in self.trainer.model.modules() if isinstance(module, TaskSet)]
        for shared in self._shared:
            shared.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the step happen, or leave it without gradients.

        Raises:
            FloatingPointError: the step is not finite and ``nan_policy`` is "stop", or no later one could be either.
        """
        batches, self._seen = self._seen, []
        trainer = self.trainer
        if self._is_finite(batches):
            trainer.end_step()
            return
        trainer.model.zero_grad()
        for shared in self._shared or ():
            shared.drop_step()
        message, hopeless = self._explain(batches, state.global_step + 1)
        if trainer.args.nan_policy == "stop" or hopeless:
            raise FloatingPointError(message)
        trainer.end_step(skipped=True)
        if state.is_world_process_zero:
            _log.warning("%s; the step is left out", message)

    def _is_finite(self, batches: Sequence[tuple[Batch, Tensor]]) -> bool:
        accelerator = self.trainer.accelerator
        numbers = [loss.float() for _, loss in batches]
        if accelerator.scaler is None:
            grads = [_local(p.grad) for p in self.trainer.model.parameters() if p.grad is not None]
            grads = [grad for grad in grads if grad.numel()]  # a process may have nothing of a small sharded parameter
            # the largest entry, since a norm of finite numbers may overflow
            numbers.append(torch.nn.utils.get_total_norm(grads, float("inf")).float())
        device = accelerator.device
        bad = (~torch.isfinite(torch.stack([number.to(device) for number in numbers]))).any().float()
        return not accelerator.reduce(bad, "sum").item()

    def _explain(self, batches: Sequence[tuple[Batch, Tensor]], step: int) -> tuple[str, bool]:
        """What to tell the user, the same on every process, and whether the weights themselves are broken."""
        trainer = self.trainer
        weight = first_nonfinite(trained_parameters(trainer.model))
        bad_loss = any(not torch.isfinite(loss) for _, loss in batches)
        finding = self._search(batches)
        if weight is not None:
            finding = (_tasks(batches), f"the weight {_short(weight)}")
        everywhere = gather_object([(bad_loss, weight is not None, finding, _tasks(batches))])
        found = [finding for *_, finding, _ in everywhere if finding is not None]
        tasks = set().union(*(ids for ids, _ in found) if found else (ids for *_, ids in everywhere))
        names = ", ".join(trainer.task_name(task) for task in sorted(tasks))
        where = found[0][1] if found else "none that computing the step again without dropout shows"
        what = "loss" if any(bad for bad, *_ in everywhere) else "gradient"
        message = (
            f"step {step}: the {what} is not finite; first such value: {where}; tasks of the batch: {names}. "
            "Nothing of this step was applied or saved"
        )
        return message, any(broken for _, broken, *_ in everywhere)

    def _search(self, batches: Sequence[tuple[Batch, Tensor]]) -> Finding | None:
        """The first value that is not finite, with the tasks of the samples that have it.

        Computes the step again, in evaluation mode: training would count its samples twice. Every process of a sharded
        model runs as many forward passes as the others.
        """
        trainer = self.trainer
        found: list[Finding] = []
        training = trainer.model.training
        trainer.model.eval()
        try:
            for inputs, loss in batches:
                found += _in_inputs(inputs)
                with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                    found += self._in_pass(trainer.model_inputs(inputs), _ids(inputs), torch.isfinite(loss))
        finally:
            trainer.model.train(training)
        return found[0] if found else None

    def _in_pass(self, inputs: Batch, tasks: Tensor, loss_was_finite: Tensor) -> list[Finding]:
        model = self.trainer.model
        found: list[Finding] = []

        def look(name: str, args: tuple[Any, ...], output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                fine = all(torch.isfinite(x).all() for x in args if isinstance(x, Tensor))
                whose = "its input is finite" if fine else "its input is not finite either"
                found.append((_of_samples(output, tasks), f"the output of {_short(name)} ({whose})"))

        layers: list[tuple[str, Any]] = [
            (name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
        ]
        hooks = [
            module.register_forward_hook(lambda _, args, output, name=name: look(name, args, output))
            for name, module in layers
        ]
        try:
            loss = model(**inputs).loss
        finally:
            for hook in hooks:
                hook.remove()
        sharded = self.trainer.accelerator.distributed_type == DistributedType.FSDP
        if not found and loss.requires_grad and not sharded:
            named = list(trained_parameters(model))
            grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            name = first_nonfinite((n, g) for (n, _), g in zip(named, grads, strict=True) if g is not None)
            if name is not None:
                found.append((set(tasks.tolist()), f"the gradient of {_short(name)}"))
        if not found and not loss_was_finite:
            found.append((set(tasks.tolist()), "the loss itself, or a loss that the method adds"))
        return found


def trained_parameters(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Names and values of what trains."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is not finite (of a sharded one, in this process's part), or None.

    One host synchronisation, however many tensors.
    """
    named = [(name, _local(t.detach())) for name, t in tensors if t.is_floating_point()]
    if not named:
        return None
    device = named[0][1].device
    finite = torch.stack([torch.isfinite(t).all().to(device) for _, t in named]).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)


def refuse_nonfinite(model: nn.Module, *, everywhere: bool = True) -> None:
    """Raise FloatingPointError if a trained weight or a statistic of the adapter is not finite: it is not to be saved.

    Args:
        everywhere: every process calls this, and all of them raise if one has such a weight.
    """
    statistics = ((name, buffer) for name, buffer in model.named_buffers() if SHARED_MARK in f".{name}")
    names = [first_nonfinite([*trained_parameters(model), *statistics])]
    name = next((name for name in (gather_object(names) if everywhere else names) if name), None)
    if name is not None:
        raise FloatingPointError(f"the weight {_short(name)} is not finite; nothing was saved")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _ids(inputs: Batch) -> Tensor:
    """The tasks of a batch, ``[samples]`` or ``[tokens]``; with one task there need be none."""
    ids = inputs.get("task_ids")
    return torch.zeros(1, dtype=torch.long) if ids is None else ids.reshape(-1)


def _tasks(batches: Sequence[tuple[Batch, Tensor]]) -> set[int]:
    """Ids of the tasks in these batches; of those alone that have a bad loss, if any has."""
    bad = [inputs for inputs, loss in batches if not torch.isfinite(loss)]
    return {task for inputs in bad or [inputs for inputs, _ in batches] for task in _ids(inputs).tolist()}


def _of_samples(values: Tensor, tasks: Tensor) -> set[int]:
    """Tasks of the samples ``values [batch, ...]`` of which are not finite; of all where its rows are no samples."""
    if values.dim() == 0 or len(values) != len(tasks):
        return set(tasks.tolist())
    rows = torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else torch.isfinite(values)
    return set(tasks[~rows.to(tasks.device)].tolist())


def _in_inputs(inputs: Batch) -> list[Finding]:
    return [
        (_of_samples(value, _ids(inputs)), f"the batch's {name}")
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all()
    ]
