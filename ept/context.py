"""The tasks of the forward pass under way, for layers that are called without ``task_ids``.

A model calls its linears with nothing but x. The caller's ``task_ids`` therefore travel beside the call, in a context
variable: each thread (and each asynchronous task) has its own, so concurrent passes do not see each other's tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .tasks import TaskIds, TaskSet

T = TypeVar("T")


def _graph_task() -> int:
    """The backward pass that this code runs in, or -1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@dataclass
class TaskContext:
    """Tasks of one forward pass.

    Attributes:
        task_ids: as the caller gave them, or resolved; None with a single task.
        attention_mask: ``[batch, sequence]``, 1 for tokens and 0 for padding, or None.
        decoder_mask: of the decoder's tokens, where the model is an encoder-decoder and they are known.
        pooled: inputs of adapted layers, pooled to ``[batch, d]``, for the contrastive loss; None does not collect.
        expands: whether a model's batch may be a whole multiple of the ids (generation: the beams of a sample).
        terms: what layers contribute to their method's loss (``auxiliary.py``); None does not collect.
        shared: what one layer computed for the others of this pass, see ``once``.
        recomputes: whether this repeats a part of an earlier pass, for gradient checkpointing.
        owner: the model whose forward pass this is, or None for a block of the caller's.
        outer: the context that this one hides.
        tables: tasks (``TaskSet``) that have resolved ``task_ids`` already, so that their layers need not do it again.
        graph_task: the backward pass that it was made in, or -1.
    """

    task_ids: TaskIds | None
    attention_mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    pooled: list[Tensor] | None = None
    expands: bool = False
    terms: list[Tensor] | None = None
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)
    recomputes: bool = False
    owner: nn.Module | None = field(default=None, repr=False)
    outer: TaskContext | None = field(default=None, repr=False)
    tables: tuple[TaskSet, ...] = field(default=(), repr=False)
    graph_task: int = field(default_factory=_graph_task, repr=False)
    _last: Tensor | None = field(default=None, repr=False)
    _decoding: bool = field(default=False, repr=False)
    _encoded: Tensor | None = field(default=None, repr=False)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` at the first call of this pass with ``key``, and the same result at every later one.

        For what the first adapted layer of a forward pass decides for all (TuckA's router); ``attention_mask`` is at
        hand. The passes of a generation share results with the first of them, so one prompt has one decision. Under
        gradient checkpointing a block recomputes what it computed itself and finds what it found.
        """
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def enter_decoder(self, encoded: Tensor | None) -> None:
        """From here on layers read the decoder's tokens, or ``encoded``, the encoder's output (cross attention)."""
        self._decoding, self._encoded = True, encoded

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of the tokens of x, the input of an adapted layer, as far as one is known.

        Shapes alone would not tell: a decoder's sequence may be as long as the encoder's.
        """
        if self._decoding and x is not self._encoded and self.decoder_mask is not None:
            return self.decoder_mask
        return self.attention_mask

    def recomputation(self) -> Callable[[], TaskContext]:
        """Makes contexts for running the code that follows once more: same tasks, same mask, same shared results."""
        shared, terms = dict(self.shared), self.terms
        decoding, encoded = self._decoding, self._encoded

        def again() -> TaskContext:
            return TaskContext(
                self.task_ids,
                self.attention_mask,
                self.decoder_mask,
                terms=None if terms is None else [],  # the same operations, whose results nobody needs again
                shared=dict(shared),
                tables=self.tables,
                recomputes=True,
                _decoding=decoding,
                _encoded=encoded,
            )

        return again

    def collect(self, x: Tensor, dim: int) -> None:
        """Pool the input of an adapted layer over its tokens, if it has the width ``dim`` of the task embeddings.

        Detached: the loss moves the embeddings towards the representations, not the other way round. Layers that read
        the same tensor one after the other (query, key and value) count once.
        """
        if self.pooled is None or x.shape[-1] != dim or x.dim() not in (2, 3) or x is self._last:
            return
        self._last = x
        rows = x.detach()
        if rows.dim() == 3:
            rows = masked_mean(rows, self.mask_of(x))
        self.pooled.append(rows)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that ``mask`` keeps, in at least fp32. x ``[batch, sequence, d]`` -> ``[batch, d]``.

    A mask of another shape (windows, a decoder whose own is unknown) is ignored; a sample without tokens gives zeros.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1, dtype=dtype)
    weights = mask.to(x.device, dtype).unsqueeze(-1)
    return (x.to(dtype) * weights).sum(1) / weights.sum(1).clamp_min(1)


_current: ContextVar[TaskContext | None] = ContextVar("ept_task_context", default=None)


class _Traced:
    """The context while ``torch.compile`` traces a model: Dynamo cannot read a context variable.

    Set and restored inside one traced region, so at run time it is constantly None and threads do not meet here. A
    layer compiled without its model falls through to the context variable: a graph break, never a stale task.
    """

    context: TaskContext | None = None


_traced = _Traced()


def current() -> TaskContext | None:
    """The context of the pass under way in this thread, or None.

    Raises:
        ValueError: a backward pass runs layers again and has left the tasks of their forward pass behind: those that
            surround ``backward()`` need not be theirs.
    """
    if torch.compiler.is_compiling():
        return _current.get() if _traced.context is None else _traced.context
    context = _current.get()
    if context is not None and context.graph_task != torch._C._current_graph_task_id():
        raise ValueError(
            "task_ids are unknown here: a backward pass runs layers anew, and not by torch.utils.checkpoint, which "
            "remembers the tasks; use that, or open an ept.use_tasks block inside what is run anew"
        )
    return context


def push(context: TaskContext) -> None:
    """Make ``context`` current until ``pop``."""
    if torch.compiler.is_compiling():
        context.outer, _traced.context = _traced.context, context
    else:
        context.outer = _current.get()
        _current.set(context)


def pop(context: TaskContext) -> None:
    """Make the context current that was so before ``push(context)``."""
    if torch.compiler.is_compiling():
        _traced.context = context.outer
    else:
        _current.set(context.outer)
    context.outer = context._last = context._encoded = None
    context.shared = {}  # not cleared: the passes of a generation hold the same one


def restore(context: TaskContext | None) -> None:
    """Make ``context`` current, whatever has been pushed since it was."""
    _current.set(context)


@contextmanager
def activate(context: TaskContext) -> Iterator[TaskContext]:
    """Make ``context`` current inside the block."""
    push(context)
    try:
        yield context
    finally:
        pop(context)


@contextmanager
def use_tasks(task_ids: TaskIds, attention_mask: Tensor | None = None) -> Iterator[TaskContext]:
    """Give ``task_ids`` to every ``EPTLinear`` called inside the block, for code that calls layers with x alone.

    Args:
        task_ids: an id or name for the whole batch, one for each sample, or an integer tensor ``[batch]``.
        attention_mask: ``[batch, sequence]``, for the contrastive loss's pooling.

    Yields:
        The context; pass it to ``ept.contrastive_loss`` after the forward pass.
    """
    with activate(TaskContext(task_ids, attention_mask, pooled=[])) as context:
        yield context


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

    The plain one recomputes during backward, with whatever block surrounds ``backward()``. Models of transformers
    inside the PEFT tuner need neither.
    """
    plain = torch.utils.checkpoint.checkpoint
    return _CheckpointWithTasks(plain)(function, *args, use_reentrant=use_reentrant, **kwargs)


def checkpoint_with_tasks(model: nn.Module) -> None:
    """Make every checkpointing function that transformers put on ``model`` recompute under the right tasks."""
    module: Any  # with an attribute of transformers
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _CheckpointWithTasks):
            module._gradient_checkpointing_func = _CheckpointWithTasks(function)
