"""Merge one task's update into a frozen weight, and take it out again to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .layer_adapter import LayerAdapter
from .mixture import TaskMixture
from .tasks import ResolvedTasks


def merged_weight(
    weight: Tensor,
    adapters: list[LayerAdapter],
    task: int,
    *,
    transposed: bool = False,
    names: Sequence[str] = (),
) -> Tensor:
    """``weight + sum of the adapters' updates`` for one task, added in at least fp32 and rounded once.

    Args:
        weight: ``[out, in]``, or ``[in, out]`` with ``transposed`` (GPT-2's ``Conv1D``).
        task: resolved id.
        names: of the adapters, for the error.

    Raises:
        ValueError: the result is not finite; nothing has been changed then.
    """
    total = weight.detach().T if transposed else weight.detach()
    if len(adapters) > 1:  # one is rounded once by the op; a sum of several is held in a wider dtype until its end
        dtypes = (torch.float32, *(p.dtype for adapter in adapters for p in adapter.parameters()))
        total = total.to(reduce(torch.promote_types, dtypes, total.dtype))
    with torch.no_grad():
        for adapter in adapters:
            total = adapter.merge_into(total, task)
    total = (total.T if transposed else total).to(weight.dtype).contiguous()
    if not torch.isfinite(total).all():
        # PEFT's own words, which its users look for.
        whose = f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: "
        message = f"merging task {task} gives a weight that is not finite; nothing was changed"
        raise ValueError(f"{whose if names else ''}{message}")
    return total


def check_stored_weight(module: nn.Module, name: str) -> None:
    """Refuse a weight that is computed at every call: what is put into it is lost at the next one.

    Args:
        name: what the error calls ``module``.

    Raises:
        ValueError: a parametrised, normed or pruned weight, or one that accelerate loads for each call.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{name} ({type(module).__name__}) computes its weight anew at every call (a parametrisation, weight_norm, "
            "spectral_norm, pruning), so nothing can be merged into it; make the weight an ordinary parameter first, "
            "as torch.nn.utils.parametrize.remove_parametrizations does"
        )
    if weight.is_meta and getattr(module, "_hf_hook", None) is not None:
        raise ValueError(f"{name} is offloaded: its weight is loaded for each call, and nothing can be merged into it")


def check_merged_task(tasks: ResolvedTasks, merged_task: int) -> None:
    """Refuse a call for another task than the one whose update is in the weight.

    Raises:
        ValueError: another task.
    """
    message = f"task_ids must be {merged_task}, the task that is merged into the weight; unmerge first"
    if isinstance(tasks, TaskMixture):
        raise ValueError(f"{message} (got a mixture of tasks)")
    if isinstance(tasks, int):
        if tasks != merged_task:
            raise ValueError(f"{message} (got {tasks})")
    elif torch.compiler.is_compiling():
        torch._assert_async(tasks.eq(merged_task).all(), message)
    else:
        try:
            torch._assert_async(tasks.eq(merged_task).all(), message)
        except RuntimeError as error:
            raise ValueError(f"{message} (got {tasks.tolist()})") from error


class WeightStash(nn.Module):
    """The original weight beside a merged one: moves with its module, is never saved.

    Merging swaps the parameter's storage instead of adding into it, so taking the update out restores the same bits.
    """

    original: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("original", None, persistent=False)

    def swap_in(self, parameter: nn.Parameter, merged: Tensor) -> None:
        """Put ``merged`` in place of the original, or of what was merged before."""
        if self.original is None:
            self.original = parameter.data
        parameter.data = merged

    def swap_out(self, parameter: nn.Parameter) -> None:
        assert self.original is not None, "nothing was swapped in"
        parameter.data, self.original = self.original, None


def keep_calling(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing, but tells PyTorch that the layer must be called.

    ``nn.TransformerEncoderLayer`` in evaluation otherwise reads ``weight`` itself and passes the adapter by.
    """
