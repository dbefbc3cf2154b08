"""The tasks of the forward pass under way, for layers that are called without ``task_ids``.

A model calls its linears with nothing but x. The caller's ``task_ids`` therefore travel beside the call, in a context
variable: each thread (and each asynchronous task) has its own, so concurrent passes do not see each other's tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .mixture import TaskMixture
from .prototypes import masked_mean
from .rows import BATCH_SECOND, LAYOUTS, ROWS, Ids, Layout, Place, RowIndex, RowTracker, refusal, take, tasks_of_rows
from .tasks import ResolvedTasks, TaskIds, TaskSet, count_samples, flat_ids

if TYPE_CHECKING:
    from .provenance import SampleTracker

T = TypeVar("T")

#: In place of a task: a representation that no token went into, which the contrastive loss leaves out.
NO_TASK = -100


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
        expands: how often ``generate`` repeats every sample (beams, returned sequences); 0 outside a generation.
        terms: what layers contribute to their method's loss (``auxiliary.py``); None does not collect.
        shared: what one layer computed for the others of this pass, see ``once``.
        recomputes: whether this repeats a part of an earlier pass, for gradient checkpointing.
        owner: the model whose forward pass this is, or None for a block of the caller's.
        outer: the context that this one hides.
        tables: tasks (``TaskSet``) that have resolved ``task_ids`` already, so that their layers need not do it again.
        graph_task: the backward pass that it was made in, or -1.
        shape: ``(batch, sequence)`` where there is an id for every token, in their order; None with one a sample.
        segments: of packed samples, which one each token belongs to, ``[batch * sequence]``, and their own tasks.
        sequence: whether the batch has a dimension beside that of its samples.
        layout: how rows run in the part of the model under way (``ept.row_layout``); None says nothing.
        tracker: follows tokens that a part of the model selects, while one does.
        samples: follows the samples to layers whose place in the model is not known, while it runs.
        outer_layouts: what ``layout`` was outside the parts of such a block that are under way.
        uniform: whether all ids are the same; None until they are read.
        fitted: tasks for inputs of layers that were asked for before, see ``rows.fit``.
        targets: the tasks of ``pooled``, one tensor each; None: those of ``task_ids``.
    """

    task_ids: TaskIds | None
    attention_mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    pooled: list[Tensor] | None = None
    expands: int = 0
    terms: list[Tensor] | None = None
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)
    recomputes: bool = False
    owner: nn.Module | None = field(default=None, repr=False)
    outer: TaskContext | None = field(default=None, repr=False)
    tables: tuple[TaskSet, ...] = field(default=(), repr=False)
    graph_task: int = field(default_factory=_graph_task, repr=False)
    shape: tuple[int, int] | None = None
    segments: tuple[Tensor, ResolvedTasks] | None = field(default=None, repr=False)
    sequence: bool = False
    layout: Layout | None = None
    tracker: RowTracker | None = field(default=None, repr=False)
    samples: SampleTracker | None = field(default=None, repr=False)
    outer_layouts: list[Layout | None] = field(default_factory=list, repr=False)
    uniform: bool | None = None
    fitted: dict[Any, ResolvedTasks] = field(default_factory=dict, repr=False)
    targets: list[Tensor | None] = field(default_factory=list, repr=False)
    _last: Tensor | None = field(default=None, repr=False)
    _decoding: bool = field(default=False, repr=False)
    _encoded: Tensor | None = field(default=None, repr=False)

    @property
    def count(self) -> int | None:
        """How many samples, or tokens, have ids of their own; None with one for all."""
        given: Any = self.task_ids
        return len(given) if isinstance(given, (list, tuple, np.ndarray)) else count_samples(given)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` at the first call of this pass with ``key``, and the same result at every later one.

        For what the first adapted layer of a forward pass decides for all (TuckA's router). The passes of a generation
        share results with the first of them, so one prompt has one decision. Under gradient checkpointing a block
        recomputes what it computed itself and finds the rest.
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
        decoding, encoded, layout = self._decoding, self._encoded, self.layout

        def again() -> TaskContext:
            return TaskContext(
                self.task_ids,
                self.attention_mask,
                self.decoder_mask,
                terms=None if terms is None else [],  # the same operations; their results are not used
                shared=dict(shared),
                tables=self.tables,
                recomputes=True,
                shape=self.shape,
                sequence=self.sequence,
                layout=layout,
                uniform=self.uniform,
                _decoding=decoding,
                _encoded=encoded,
            )

        return again

    def shown(self, x: Tensor, dim: int) -> tuple[bool, bool] | None:
        """``SampleTracker.samples_at``; None where samples are not followed."""
        return None if self.samples is None else self.samples.samples_at(x, dim)

    def one_task(self, tasks: ResolvedTasks) -> ResolvedTasks | None:
        """The task that all of ``task_ids`` name, as resolved for a whole batch; None where they differ.

        Reads the device, once for all layers, and only where their rows cannot be told apart.
        """
        if self.uniform is None:
            values = tasks.weights if isinstance(tasks, TaskMixture) else tasks
            self.uniform = isinstance(values, Tensor) and len(values) > 0 and bool((values == values[:1]).all())
        if not self.uniform or isinstance(tasks, int):
            return None
        return take(tasks, slice(0, 1))

    @contextmanager
    def serving(self, places: Tensor | slice) -> Iterator[None]:
        """Inside the block the ids are those at some places of ``task_ids``, resolved, and nothing is pooled."""
        kept = self.task_ids, self.pooled, self.fitted
        tasks: Any = self.task_ids  # of a model's pass, and so resolved
        self.task_ids, self.pooled, self.fitted = take(tasks, places), None, {}
        try:
            yield
        finally:
            self.task_ids, self.pooled, self.fitted = kept

    def collect(self, x: Tensor, dim: int, layout: Layout | None = None) -> None:
        """Pool the input of an adapted layer over its tokens, if it has the width ``dim`` of the task embeddings.

        Detached: the loss moves the embeddings towards the representations, not the other way round. Layers that read
        the same tensor one after the other (query, key and value) count once. Tokens that some part of the model has
        selected are no samples, and do not count.
        """
        if self.pooled is None or x.shape[-1] != dim or x.dim() not in (2, 3) or x is self._last:
            return
        if isinstance(layout, RowIndex):
            return
        self._last = x
        rows: Tensor = x.detach()
        target: Tensor | None = None
        if rows.dim() == 3:
            if layout == BATCH_SECOND:
                rows = rows.transpose(0, 1)
            if self.shape is not None:
                if rows.shape[:2] != self.shape:
                    return
                rows, target = self._pool_packed(rows)
            else:
                rows = masked_mean(rows, self.mask_of(x))
        elif self.shape is not None:
            return
        if target is None and self.count and len(rows) % self.count:
            return
        self.pooled.append(rows)
        self.targets.append(target)

    def _pool_packed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the packed samples of x ``[batch, sequence, d]``, and their tasks: ``[G, d]``, ``[G]``.

        Where samples are not told apart, the tokens that one task has in one row of the batch stand for one.
        """
        tasks: Any = self.task_ids  # resolved, one a token
        if isinstance(tasks, TaskMixture):  # no labels, and no loss
            return x[:0, 0], torch.empty(0, dtype=torch.long, device=x.device)
        if self.segments is not None:
            places, targets = self.segments
            groups: Any = len(targets) if isinstance(targets, Tensor) else 0
        else:
            count = self.tables[0].num_tasks if self.tables else int(tasks.max()) + 1
            rows = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1], output_size=len(tasks))
            places, groups = rows * count + tasks.to(x.device), len(x) * count
            targets = torch.arange(count, device=x.device).repeat(len(x))
        dtype = torch.promote_types(x.dtype, torch.float32)
        mask = self.attention_mask
        kept = x.new_ones(len(places), 1, dtype=dtype)
        if mask is not None and mask.shape == x.shape[:2]:
            kept = mask.reshape(-1, 1).to(dtype)
        places = places.to(x.device)
        sums = kept.new_zeros(groups, x.shape[-1]).index_add_(0, places, x.flatten(0, 1).to(dtype) * kept)
        sizes = kept.new_zeros(groups, 1).index_add_(0, places, kept)
        assert isinstance(targets, Tensor), "packed samples have a task each"
        return sums / sizes.clamp_min(1), targets.to(x.device).masked_fill(sizes[:, 0] == 0, NO_TASK)


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
            "task_ids are unknown here: a backward pass runs layers again, and not by torch.utils.checkpoint, which "
            "remembers the tasks; use that, or open an ept.use_tasks block inside what is run again"
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
    if context.samples is not None:
        context.samples.leave()
    context.outer = context._last = context._encoded = context.samples = None
    context.fitted = {}
    context.shared = {}  # not cleared: the passes of a generation hold the same one


def restore(context: TaskContext | None) -> None:
    """Make ``context`` current and forget what has been pushed since."""
    left = _current.get()
    while left is not None and left is not context:
        if left.samples is not None:
            left.samples.leave()
        left = left.outer
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
            Or ``[batch, sequence]``, one for every token.
        attention_mask: ``[batch, sequence]``, for the contrastive loss's pooling.

    Yields:
        The context; pass it to ``ept.contrastive_loss`` after the forward pass.
    """
    ids, shape = flat_ids(task_ids)
    with activate(TaskContext(ids, attention_mask, pooled=[], shape=shape)) as context:
        yield context


def fit(tasks: ResolvedTasks, count: int, x: Tensor, context: TaskContext, place: Place, name: str) -> ResolvedTasks:
    """Tasks for the rows of x: one for each of N equal runs of rows, where N divides their number.

    Args:
        tasks: resolved ids or a mixture, of ``count`` samples or tokens.
        x: ``[..., in]``.
        name: of the layer, for the message.

    Raises:
        ValueError: it is not known which rows belong to which ids, and they differ.
    """
    if count == 1 or isinstance(tasks, int):
        return tasks
    layout = context.layout if context.layout is not None else place.layout
    lead = x.shape[:-1]
    key = (layout, lead, count, place)
    if place.guessed and context.layout is not None:
        place = replace(place, guessed=False)
    remembers = not torch.compiler.is_compiling() and (place.known or context.samples is None)
    if remembers and key in context.fitted:
        return context.fitted[key]
    ids = Ids(count, context.shape, context.sequence)
    fitted = tasks_of_rows(tasks, ids, lead, place, layout, lambda dim: (context.shown(x, dim) or (None,))[0])
    if fitted is None:
        fitted = context.one_task(tasks)
    if fitted is None:
        raise ValueError(refusal(ids, x, place, layout, name))
    if remembers:
        context.fitted[key] = fitted
    return fitted


@contextmanager
def row_layout(
    layout: str = ROWS, *, samples: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Iterator[None]:
    """Say how the rows run that adapted layers see inside the block; also a decorator, of a module's ``forward``.

    Args:
        layout: "batch_first": ``[batch, ...]``. "batch_second": ``[sequence, batch, ...]``. "rows": in the order of the
            batch, equally many consecutive rows for each of the ids (windows, patches, flattened tokens).
        samples: for "rows" in any order, such as tokens that were selected or sorted: which of the call's ids each of
            them has, counted from 0, int64 ``[rows]``.
        cu_seqlens: for "rows" of samples of different lengths: where each begins and the last ends, ``[samples + 1]``.

    Raises:
        ValueError: another layout, or ``samples`` or ``cu_seqlens`` that do not fit it.
    """

    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    given = [tensor for tensor in (samples, cu_seqlens) if tensor is not None]
    if len(given) > 1 or (given and layout != ROWS):
        raise ValueError(f"samples or cu_seqlens, not both, may be given with layout='rows', got layout={layout!r}")
    for tensor in given:
        if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"samples and cu_seqlens must be 1-D integers, got {list(tensor.shape)} {tensor.dtype}")
    context = current()
    if context is None:
        yield
        return
    before, context.layout = context.layout, RowIndex(samples, cu_seqlens) if given else layout
    try:
        yield
    finally:
        context.layout = before
