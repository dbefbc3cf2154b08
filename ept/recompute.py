"""Gradient checkpointing: layers that run again during backward get back the tasks of the pass they belong to.

A model's own checkpointing (timm, OpenCLIP, code beside a checkpoint) imports torch's function by name, so there is no
attribute of the model to wrap. What torch keeps for the recomputation is wrapped instead. Without tasks, and for every
other model, torch's functions do what they did before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from .context import activate, current


class _CheckpointWithTasks:
    """A model's checkpointing function, made to recompute under the tasks that it first ran with.

    Recomputation happens during backward, when the pass's context is gone (and in another thread on a GPU).
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = current()
        if context is None:
            return self.checkpoint(function, *args, **kwargs)
        first_run, again = True, context.recomputation()

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            nonlocal first_run
            if first_run:
                first_run = False
                return function(*inner, **inner_kwargs)
            with activate(again()):
                return function(*inner, **inner_kwargs)

        return self.checkpoint(run, *args, **kwargs)


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint``, recomputing under the tasks of the ``use_tasks`` block it was called in.

    Torch's own recomputes during backward, inside the block that surrounds ``backward()``, if any. Models of
    transformers inside the PEFT tuner need neither.
    """
    return _CheckpointWithTasks(torch_checkpoint.checkpoint)(function, *args, use_reentrant=use_reentrant, **kwargs)


def checkpoint_with_tasks(model: nn.Module) -> None:
    """Make every checkpointing function that transformers put on ``model`` recompute under the right tasks."""
    module: Any  # with an attribute of transformers
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _CheckpointWithTasks):
            module._gradient_checkpointing_func = _CheckpointWithTasks(function)


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
