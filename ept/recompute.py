"""Layers that ``torch.utils.checkpoint`` runs again during backward get back the tasks of the pass they belong to.

A model's own checkpointing (timm, OpenCLIP, code beside a checkpoint) imports the function by name and calls it from
wherever it likes, so there is nothing of the model's to wrap: what torch keeps for the recomputation is wrapped.
Without tasks at hand, and for every other model, torch's functions do what they did.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from .context import activate, current


def under_these_tasks(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, to be run under the tasks of the pass that is under way now, whenever that will be."""
    context = current()
    if context is None:
        return function
    again = context.recomputation()

    def recompute(*args: Any, **kwargs: Any) -> Any:
        with activate(again()):
            return function(*args, **kwargs)

    return recompute


def remember_tasks() -> None:
    """Make torch's checkpointing, of either kind, remember tasks. Safe to call twice."""
    frame: Any = torch_checkpoint._CheckpointFrame  # made for every checkpointed call with use_reentrant=False
    reentrant: Any = torch_checkpoint.CheckpointFunction
    if hasattr(frame.__init__, "__wrapped__"):
        return
    make_frame, run = frame.__init__, reentrant.forward

    @wraps(make_frame)
    def init(self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        make_frame(self, under_these_tasks(recompute_fn), *args, **kwargs)

    @wraps(run)
    def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        recompute = under_these_tasks(run_function)
        output = run(ctx, run_function, *args)
        ctx.run_function = recompute
        return output

    frame.__init__, reentrant.forward = init, staticmethod(forward)
