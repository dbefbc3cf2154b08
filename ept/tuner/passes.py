"""The tasks of a call: out of its arguments, through the model to the layers, and what ``task_ids="auto"`` means."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch._dynamo.decorators import skip_code

from ept_kernels.tracing import is_eager

from ..adapted_linear import check_merged_task
from ..context import TaskContext, activate, current, pop, push, restore
from ..layer_adapter import LayerAdapter
from ..methods import method_of
from ..mixture import TaskMixture
from ..prototypes import TaskPrototypes, embedding_layer, input_representation
from ..provenance import SampleTracker
from ..recompute import checkpoint_with_tasks
from ..rows import repeat, take
from ..tasks import AUTO, ResolvedTasks, TaskIds, TaskSet, count_samples, wants_auto
from .calls import (
    IGNORED,
    Entries,
    batch_size,
    decoder_mask,
    decoder_of,
    entries_of,
    has_sequence,
    main_input,
    packed_samples,
    takes,
)
from .layer import EPTLinearLayer
from .structure import is_followed, takes_choices

#: Training passes after which a recipe that is not followed is no oversight of the moment.
_PASSES_WATCHED = 50


class TaskPasses(BaseTuner):
    """A tuner whose adapters have tasks: ``ept_task_tables`` holds those of each, and what its layers share."""

    model: Any  # of any library
    peft_config: dict[str, Any]  # of one method's config; PEFT's own class says less
    ept_task_tables: Any  # an nn.ModuleDict of TaskSets
    _merged: tuple[EPTLinearLayer, ...]  # one layer that is merged, if any is: all are merged together
    _unknown: list[LayerAdapter]  # whose rows may be others than they seem
    _trained: TaskContext | None  # of the last training pass, for the method's losses
    recipe_missing: set[str]  # functions of EPT's recipe that nobody has called yet
    _passes: int  # training passes that have been watched for them
    _items: tuple[Tensor, Any] | None  # its labels, and how many of them its optimizer step has, where that is said

    def adapters(self, adapter_name: str) -> dict[str, LayerAdapter]:
        """The adapter of every adapted layer, by the layer's name in the base model."""
        return {
            path: module.ept_adapters[adapter_name]
            for path, module in self.model.named_modules()
            if isinstance(module, EPTLinearLayer) and adapter_name in module.ept_adapters
        }

    def _own_config(self, adapter_name: str) -> Any:
        """The adapter's config, to be changed: a copy, for other adapters and models may have been made with it."""
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        return config

    @property
    def merged_task(self) -> int | None:
        """The task whose updates are in the base weights, or None."""
        return self._merged[0].merged_task if self._merged else None

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.ept_task_tables]

    def _tables(self) -> tuple[TaskSet, ...]:
        """The tables that ``resolve_tasks`` asks."""
        return tuple(self.ept_task_tables[name] for name in self._active())

    def _disabled(self) -> bool:
        layers = (module for module in self.model.modules() if isinstance(module, EPTLinearLayer))
        return next((layer.disable_adapters for layer in layers), True)  # all are disabled together

    @property
    def routes_by_task(self) -> bool:
        """Whether the method treats tasks differently: all adapters are of one method."""
        return any(shared.routes for shared in self.ept_task_tables.values())

    def resolve_tasks(self, task_ids: TaskIds | None, batch: int | None = None) -> ResolvedTasks | None:
        """Resolved ids for the active adapters, or None where nothing routes and none are given.

        Raises:
            ValueError, TypeError: as ``TaskTable.resolve``, or another number of ids than samples.
        """
        names = self._active()
        if not names or (task_ids is None and (self._disabled() or not self.routes_by_task)):
            return None
        if len(names) > 1:
            self._check_same_names(names, task_ids)
        resolved = self.ept_task_tables[names[0]].resolve(task_ids)
        for name in names[1:]:  # the other active adapters must know these ids too
            self.ept_task_tables[name].resolve(task_ids)
        samples = count_samples(resolved)
        if samples is not None and batch is not None and samples != batch:
            raise ValueError(
                f"task_ids must hold one id for each of the {batch} samples, got {samples}; samples that are packed "
                "into rows need task_ids of the shape of input_ids, or position_ids or cu_seq_lens_q beside theirs"
            )
        return resolved

    def _check_same_names(self, names: list[str], task_ids: TaskIds | None) -> None:
        """Several active adapters share one set of resolved ids; names must then mean the same to all."""
        by_name = isinstance(task_ids, str) or (isinstance(task_ids, (list, tuple)) and str in map(type, task_ids))
        if by_name and len({self.ept_task_tables[name].names for name in names}) > 1:
            raise ValueError(
                f"task_ids must be ids, not names: the active adapters {names} name their tasks differently"
            )

    # ---- a pass

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the wrapped model: take ``task_ids`` out of the call, put them beside it."""
        task_ids = kwargs.pop("task_ids", None)
        x = main_input(args, kwargs)
        outer = self._outer(module, task_ids)
        if self.merged_task is not None and self._disabled():
            self.unmerge_adapter()
        if outer is not None and task_ids is None and self._has_several():
            entries = self._inherited(outer, self.find_out(outer.task_ids, args, kwargs), x, kwargs)
        else:
            entries = entries_of(self.find_out(task_ids, args, kwargs), x, kwargs)
        merged_task = self.merged_task
        by_merge = merged_task is not None and entries.ids is None and self.routes_by_task
        resolved = merged_task if by_merge else self.resolve_tasks(entries.ids, self._expected(entries, x, outer))
        if merged_task is not None and resolved is not None and self.routes_by_task:
            check_merged_task(resolved, merged_task)
        pools, sums = self._collects()
        context = TaskContext(
            resolved,
            kwargs.get("attention_mask"),
            decoder_mask(kwargs) if pools or sums else None,
            pooled=[] if pools else None,
            terms=[] if sums else None,
            shared=outer.shared if outer is not None and outer.expands else {},
            owner=module,
            tables=() if resolved is None or by_merge else self._tables(),
            shape=entries.shape,
            sequence=has_sequence(x, kwargs),
            uniform=entries.uniform,
        )
        if context.count is not None:
            self._spread(context, entries, x, outer)
            if (
                entries.shape is not None
                and pools
                and context.segments is None
                and isinstance(context.task_ids, Tensor)
            ):
                context.segments = packed_samples(context.task_ids, entries.shape, kwargs)
            if entries.shape is not None and "position_ids" in kwargs and takes(module, "use_cache"):
                kwargs.setdefault("use_cache", False)  # transformers keeps packed samples apart only without a cache
        if self.training:
            checkpoint_with_tasks(module)
            if entries.shape is None:
                self._observe(resolved, args, kwargs)
        push(context)
        self._watch_samples(context, args, kwargs)
        if takes(module, "task_ids"):
            tokens: Any = context.task_ids
            kwargs["task_ids"] = resolved if entries.shape is None else tokens.view(entries.shape)
        if (trains := self._trains()) or not self.training:
            self._trained = context if pools or sums else None
            labels, count = kwargs.get("shift_labels", kwargs.get("labels")), kwargs.get("num_items_in_batch")
            counts = trains and count is not None and isinstance(labels, Tensor)
            self._items = (self._counted(labels, kwargs), count) if counts else None
            if not torch.compiler.is_compiling() and trains and self.recipe_missing and torch.is_grad_enabled():
                self._watch_recipe()
        return args, kwargs

    def _find_unknown(self) -> None:
        """Look for adapters whose place the model's structure does not show; its first mixed batches will."""
        followed = tuple(f"{path}." for path, part in self.model.named_modules() if is_followed(part))
        self._unknown = [
            adapter
            for path, part in self.model.named_modules()
            if isinstance(part, EPTLinearLayer) and not path.startswith(followed)
            for adapter in part.ept_adapters.values()
            if not adapter.row_place.known and (adapter.row_place.layout is None or adapter.row_place.guessed)
        ]

    def _watch_samples(self, context: TaskContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follow the samples of a call to layers whose place in the model is not known, as long as there are some."""
        if torch.compiler.is_compiling() or not self._unknown or not is_eager(*self._unknown[0].parameters()):
            return
        self._unknown = [adapter for adapter in self._unknown if not adapter.row_place.known]
        if not self._unknown or context.uniform or context.shape is not None or context.count in (None, 1):
            return
        layers: dict[nn.Module, bool] = {
            part: all(adapter.row_place.plain for adapter in part.ept_adapters.values())
            for part in self.model.modules()
            if isinstance(part, EPTLinearLayer)
        }
        tracker = SampleTracker(context.count, (*args, *kwargs.values()))
        context.samples = tracker if tracker.begin(layers) else None

    def _has_several(self) -> bool:
        return any(shared.num_tasks > 1 for shared in self.ept_task_tables.values())

    def _outer(self, module: nn.Module, task_ids: TaskIds | None) -> TaskContext | None:
        """The context of a block or generation around this call, which may have its tasks."""
        needs_tasks = task_ids is None and self.routes_by_task and self._has_several()
        if torch.compiler.is_compiling() and not needs_tasks:  # Dynamo cannot read the context variable
            return None
        outer = current()
        if outer is not None and outer.owner is module:  # left by a pass that Ctrl-C ended: hooks see no such end
            pop(outer)
            outer = current()
        return outer

    def _collects(self) -> tuple[bool, bool]:
        """Whether this pass collects ``context.pooled`` and ``context.terms`` for the method's losses."""
        config = self.peft_config.get(next(iter(self.active_adapters), ""))
        return method_of(config).adapter.collects(config) if self._trains() and config is not None else (False, False)

    def _trains(self) -> bool:
        """Whether this pass is one of training: not so one of the base alone, DPO's reference."""
        return self.training and not self._disabled()

    def _watch_recipe(self) -> None:
        """Warn once of an EPT that has trained for a while without what the recipe adds to a plain trainer."""
        self._passes += 1
        if self._passes < _PASSES_WATCHED:
            return
        names, self.recipe_missing = sorted(self.recipe_missing), set()
        config = self.peft_config[self.active_adapters[0]]
        if config.contrastive_weight == 0 or config.num_tasks == 1:
            names = [name for name in names if name != "ept.auxiliary_loss"]
        if names:
            warnings.warn(
                f"EPT has trained for {_PASSES_WATCHED} passes without {' and '.join(names)}, which its recipe needs: "
                "put ept.EPTTrainerMixin before the trainer (class Mine(ept.EPTTrainerMixin, ...)), or see README",
                RuntimeWarning,
                stacklevel=2,
            )

    def _counted(self, labels: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """The labels of a pass that transformers' ``Trainer`` counts."""
        from transformers import Trainer  # no library of a pass that does not come from one

        counts = getattr(Trainer, "_get_num_items_in_batch", None)
        shifts = counts is not None and "_loss_shifts_labels" in counts.__code__.co_names  # not before 5.13
        causal = getattr(self.model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
        if shifts and causal and "shift_labels" not in kwargs and decoder_of(self.model) is None:
            return labels[..., 1:]
        return labels

    def share_of_step(self) -> Tensor | float:
        """Which part of its optimizer step the last training pass was: 1 unless ``num_items_in_batch`` said otherwise.

        It counts the step of all processes, as ``Trainer`` does by default, whose gradients are then averaged.
        """
        if self._items is None:
            return 1.0
        labels, count = self._items
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return (labels != IGNORED).sum() * processes / count

    @staticmethod
    def _inherited(outer: TaskContext, ids: TaskIds | None, x: Tensor | None, kwargs: Mapping[str, Any]) -> Entries:
        """What ``ids`` of a block or generation around this call are for."""
        if outer.shape is None and not outer.expands:
            return entries_of(ids, x, kwargs)
        if outer.shape is not None and (x is None or x.shape[:2] != outer.shape):
            given = None if x is None else list(x.shape[:2])
            raise ValueError(f"task_ids {list(outer.shape)} must hold one id for each token of the batch, got {given}")
        return Entries(ids, outer.shape, uniform=outer.uniform)

    @staticmethod
    def _expected(entries: Entries, x: Tensor | None, outer: TaskContext | None) -> int | None:
        """How many ids there must be; None where that is not known, or ``_spread`` checks it."""
        if x is None or entries.places is not None or (outer is not None and outer.expands):
            return None
        return x.shape[0] if entries.shape is None else x.shape[0] * x.shape[1]

    def _spread(self, context: TaskContext, entries: Entries, x: Tensor | None, outer: TaskContext | None) -> None:
        """From ids as they were given to ids of what the layers will see: tokens, beams, choices.

        Raises:
            ValueError: a generation that runs other rows than it has announced, or tokens of an encoder-decoder.
        """
        tasks: Any = context.task_ids
        if entries.shape is not None and decoder_of(self.model) is not None:
            raise ValueError(
                "task_ids must be one a sample: an encoder-decoder has tokens of two kinds, got one a token"
            )
        if entries.places is not None:
            places = entries.places.to(self.ept_task_tables[self._active()[0]].device)
            context.segments = (places, tasks)
            context.task_ids = take(tasks, places)
        elif entries.shape is None and x is not None and x.dim() == 3 and takes_choices(self.model):
            context.task_ids = repeat(tasks, x.shape[1])
        elif outer is not None and outer.expands and x is not None and context.count not in (1, len(x)):
            count: Any = context.count
            if len(x) == count * outer.expands:
                context.task_ids = repeat(tasks, outer.expands)
            elif (one := context.one_task(tasks)) is not None:
                context.task_ids = one
            else:
                raise ValueError(
                    f"task_ids must hold one id for each of the {len(x)} rows that generate runs, got {count} "
                    f"and {outer.expands} announced for each (num_beams, num_return_sequences): which sample a row "
                    "belongs to is not known. Generate for one task at a time"
                )

    def _enter_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = current()
        if context is not None and context.owner is self.model:
            context.enter_decoder(kwargs.get("encoder_hidden_states"))

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        context = current()
        if context is not None and context.owner is module:  # not so where _enter refused the call
            pop(context)

    @contextmanager
    def generating(
        self, task_ids: TaskIds | None, batch: int | None, attention_mask: Tensor | None = None, copies: int = 1
    ) -> Iterator[None]:
        """Give ``task_ids`` to every forward pass of a generation.

        Args:
            copies: rows that it may run for each sample, consecutively; they share its id.
        """
        resolved = self.resolve_tasks(task_ids, batch)
        uniform = entries_of(task_ids, None, {}).uniform
        tables = () if resolved is None else self._tables()
        with activate(
            TaskContext(resolved, attention_mask, expands=copies, tables=tables, sequence=True, uniform=uniform)
        ):
            yield

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around every pass and generation of the ``PeftModel``: one that fails leaves no tasks behind.

        Also PEFT's door for per-sample adapters, which no method here offers: tasks are routed by ``task_ids``.
        """
        if kwargs.get("adapter_names") is not None:
            method = self.peft_config[self.active_adapters[0]].peft_type
            raise ValueError(f"adapter_names is not supported by {method}: mix tasks in a batch with task_ids")
        if torch.compiler.is_compiling():
            yield
            return
        before = current()
        try:
            yield
        except BaseException:
            restore(before)  # `_leave` is not called where Ctrl-C ends a pass
            self._trained = None  # it may hold on to the graph of the failed pass
            raise

    # ---- task_ids="auto"

    def _new_prototypes(self, shared: TaskSet) -> TaskPrototypes:
        weight: Any = embedding_layer(self.model).weight
        return TaskPrototypes(shared.num_tasks, weight.shape[1], device=weight.device)

    def find_out(self, task_ids: TaskIds | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskIds | None:
        """``task_ids`` with every "auto" replaced by weights over the tasks, which a call's input decides.

        Raises:
            ValueError: no statistics to decide by, nothing to decide about, a merged task, or several active adapters.
        """
        if not wants_auto(task_ids):
            return task_ids
        names = self._active()
        if not names:
            return task_ids
        if self.merged_task is not None:
            raise ValueError(
                f"task_ids='auto' mixes tasks, but task {self.merged_task} is merged into the weights; unmerge it first"
            )
        if len(names) > 1:
            raise ValueError(f"task_ids='auto' needs one active adapter, whose tasks it mixes; active are {names}")
        config, shared = self.peft_config[names[0]], self.ept_task_tables[names[0]]
        if shared.prototypes is None:
            if not hasattr(config, "auto_routing"):
                raise ValueError(f"task_ids='auto' is not supported by {config.peft_type}: give ids or names")
            if not shared.routes:
                raise ValueError("task_ids='auto' has nothing to find out with routing='token': leave task_ids out")
            raise ValueError(
                f"task_ids='auto': adapter {names[0]!r} was trained without auto_routing=True; "
                "call model.learn_auto_routing(batches), or give ids or names"
            )
        found = shared.prototypes.mixture(input_representation(self.model, args, kwargs), config.temperature)
        if isinstance(task_ids, str):
            return found
        each: Any = task_ids  # a sequence that holds "auto"
        if len(each) != len(found):
            raise ValueError(f"task_ids must hold one id for each of the {len(found)} samples, got {len(each)}")
        unknown = torch.tensor([task == AUTO for task in each], device=found.weights.device)
        given = shared.resolve([0 if task == AUTO else task for task in each]).to(found.weights.device)
        known = torch.nn.functional.one_hot(given, shared.num_tasks).to(found.weights.dtype)
        return TaskMixture(torch.where(unknown[:, None], found.weights, known))

    def infer_tasks(self, *args: Any, **kwargs: Any) -> TaskMixture:
        """What ``task_ids="auto"`` makes of a batch: weights over the tasks, which may be given as ``task_ids``.

        Args: those of the model's forward; ``input_ids`` or ``inputs_embeds``, and ``attention_mask``, are read.

        Raises:
            ValueError: as ``find_out``, or no adapter is active.
        """
        found = self.find_out(AUTO, args, kwargs)
        if not isinstance(found, TaskMixture):
            raise ValueError("model has no active adapter whose tasks could be told apart")
        return found

    def learn_auto_routing(self, batches: Iterable[Mapping[str, Any]], adapter_name: str | None = None) -> None:
        """Learn to tell the tasks apart from labelled batches alone, for an adapter that was trained without.

        One pass over the embedding layer: nothing is trained, and what was learned before is forgotten. Sets the
        config's ``auto_routing``, so that the result is saved.

        Args:
            batches: arguments of the model's forward, with ``task_ids``.
            adapter_name: default: the active one.

        Raises:
            ValueError: not an EPT adapter, or one whose tokens route themselves, a batch without ``task_ids``, or a
                model without token embeddings.
        """
        name = adapter_name or self.active_adapters[0]
        config, shared = self.peft_config[name], self.ept_task_tables[name]
        if not hasattr(config, "auto_routing"):
            raise ValueError(f"learn_auto_routing is not supported by {config.peft_type}")
        if not shared.routes:
            raise ValueError(
                "learn_auto_routing: with routing='token' no task is asked for, and none is to be found out"
            )
        prototypes = self._new_prototypes(shared)
        for batch in batches:
            tasks = shared.resolve(batch.get("task_ids"))
            prototypes.observe(input_representation(self.model, (), dict(batch)), tasks)
        self._own_config(name).auto_routing, shared.prototypes = True, prototypes

    def _observe(self, resolved: ResolvedTasks | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the active adapters' statistics see a training batch whose tasks are known."""
        if resolved is None or isinstance(resolved, TaskMixture):
            return
        for name in self._active():
            prototypes = self.ept_task_tables[name].prototypes
            if prototypes is not None:
                prototypes.observe(input_representation(self.model, args, kwargs), resolved)


class NameResolver:
    """A forward pre-hook of a ``PeftModel``: ids in place of names and lists, before anything that is compiled.

    ``torch.compile`` takes strings and lists for constants and would compile again for every batch. Hooks of the module
    that it is given stay in Python, but it would compile their frames too: this one is exempt.
    """

    def __init__(self, tuner: TaskPasses) -> None:
        self.tuner = tuner

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or not isinstance(kwargs.get("task_ids"), (str, list, tuple)):
            return None
        return args, {**kwargs, "task_ids": _resolved(self.tuner, kwargs["task_ids"])}


skip_code(NameResolver.__call__.__code__)


@torch.compiler.disable
def _resolved(tuner: TaskPasses, task_ids: Any) -> Any:
    by_token = isinstance(task_ids, (list, tuple)) and any(isinstance(task, (list, tuple)) for task in task_ids)
    resolved = None if by_token or wants_auto(task_ids) else tuner.resolve_tasks(task_ids)
    return task_ids if resolved is None else resolved


class TaskGenerate:
    """``generate`` of an adapted model: keeps ``task_ids`` away from transformers, which would refuse the keyword.

    An object, not a closure, so that ``copy.deepcopy`` of the model rebinds it to the copy.
    """

    def __init__(self, model: Any, tuner: TaskPasses) -> None:
        self.model, self.tuner = model, tuner

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        generate: Any = type(self.model).generate
        outer = current()
        if task_ids is None and outer is not None and wants_auto(outer.task_ids):
            task_ids = outer.task_ids  # decided here by the prompt, not again by every pass
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
