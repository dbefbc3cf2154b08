"""The PEFT tuner of every method: injects its layers, carries ``task_ids`` to them, merges one task."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ept_kernels.geometry import check_kernel_sizes

from ..adapted_linear import check_merged_task
from ..config import AdapterConfig
from ..context import TaskContext, activate, current, pop, push, restore
from ..layer_adapter import LayerAdapter, WeightedLosses
from ..methods import method_of
from ..mixture import TaskMixture
from ..prototypes import TaskPrototypes, embedding_layer, input_representation
from ..readers import find_reader
from ..recompute import checkpoint_with_tasks
from ..rows import repeat, take
from ..tasks import AUTO, ResolvedTasks, TaskIds, TaskSet, count_samples, wants_auto
from .calls import Entries, decoder_mask, decoder_of, entries_of, has_sequence, main_input, takes
from .layer import EPTLinearLayer
from .loading import check_adapter_state, loading_options
from .passes import NameResolver, TaskGenerate
from .quantised import watch_4bit_layers
from .structure import follow_rows, place_of, takes_choices, unfollow
from .targets import matching, module_names, target_features, tied_layers


class EPTModel(BaseTuner):
    """Expert Pyramid Tuning around a model; made by ``peft.get_peft_model(model, EPTConfig(...))``.

    ``model(**batch, task_ids=...)`` and ``model.generate(..., task_ids=...)`` take an id or a name for the whole batch,
    or one for each sample (a list or a tensor ``[batch]``) or token (``[batch, sequence]``, for packed samples); "auto"
    leaves it to the input (``auto_routing``). With one task, or a method that treats all alike, they may be left out.
    A layer that cannot tell which rows belong to which id refuses a batch of several tasks (``docs/rows.md``).

    ``ept_task_tables`` holds, for every adapter, its tasks and whatever its layers share (a ``TaskSet``).
    """

    uses_shared_state = True
    prefix = "ept_"
    model: Any  # of any library
    peft_config: dict[str, Any]  # of one method's config; PEFT's own class says less
    ept_task_tables: Any  # an nn.ModuleDict of TaskSets
    tuner_layer_cls = EPTLinearLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    # ---- injection

    def _pre_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        self.ept_task_tables = nn.ModuleDict()
        self._trained: TaskContext | None = None
        self._merged: tuple[EPTLinearLayer, ...] = ()
        self._hooks: list[RemovableHandle] = []

    def _post_injection_hook(self, model: Any, config: AdapterConfig, adapter_name: str) -> None:
        self._hooks += [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
            *watch_4bit_layers(model),
        ]
        if (decoder := decoder_of(model)) is not None:
            self._hooks.append(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        if hasattr(model, "generate"):
            model.generate = TaskGenerate(model, self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT: what trains goes on training, the tables of other adapters included, and nothing else does."""
        before = [(parameter, parameter.requires_grad) for parameter in self.ept_task_tables.parameters()]
        self._injected = adapter_name  # several adapters may be of one config object
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad
        self._hooks += follow_rows(model, EPTLinearLayer)

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict[str, Any]) -> AdapterConfig:
        by_default = peft_config.target_modules is None
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        if by_default and not isinstance(config.target_modules, str):
            # Some architectures' defaults are names of several models; one that this model lacks is no mistake.
            found = matching(config.target_modules, module_names(self.model))
            config.target_modules = found or config.target_modules
        return config

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Last stop before PEFT changes the model: check the targets, make what the adapter's layers share."""
        adapter_name = self._injected
        features = target_features(model, peft_config)
        self._tied = tied_layers(model, features)
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        device = weight.device if weight is not None else None
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight is not None else None
        shared = method_of(peft_config).adapter.make_shared(peft_config, features, device=device, dtype=dtype)
        if getattr(peft_config, "auto_routing", False):
            shared.prototypes = self._new_prototypes(shared)
        self.ept_task_tables[adapter_name] = shared.requires_grad_(
            not peft_config.inference_mode and adapter_name in self.active_adapters
        )

    def became_part(self, parent: nn.Module, name: str) -> None:
        """Let a ``PeftModel`` resolve names of tasks before its forward pass, which may be compiled, begins."""
        if isinstance(parent, PeftModel):
            parent.register_forward_pre_hook(NameResolver(self), with_kwargs=True)

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, EPTLinearLayer):
            layer = target
        else:
            layer = EPTLinearLayer(target)
            layer.train(target.training)
            layer.set_adapter(self.active_adapters)
            layer.tied_to = self._tied.get(current_key)
            reader = find_reader(self.model, current_key)
            layer.read_by = None if reader is None else reader[0]
        shared = self.ept_task_tables[adapter_name]
        layer.update_layer(adapter_name, peft_config, shared, current_key, inference_mode=peft_config.inference_mode)
        declared = peft_config.layout_of(current_key)
        layer.ept_adapters[adapter_name].row_place = place_of(self.model, current_key, declared)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """An adapter is made in fp32 or wider; without autocast its parameters take the dtypes of what they adapt."""
        if autocast_adapter_dtype:
            return
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        parts = [(self.ept_task_tables[adapter_name], weight)]
        for layer, adapter in self.adapters(adapter_name).items():
            base: Any = self.model.get_submodule(layer)
            parts.append((adapter, getattr(base.get_base_layer(), "weight", None)))
        for part, like in parts:
            if like is not None and like.dtype in (torch.bfloat16, torch.float16):
                for parameter in part.parameters():
                    parameter.data = parameter.data.to(like.dtype)

    # ---- tasks of a forward pass

    def _any_layer(self) -> EPTLinearLayer | None:
        """One layer: all are disabled together."""
        return next((module for module in self.model.modules() if isinstance(module, EPTLinearLayer)), None)

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
        layer = self._any_layer()
        return layer is None or layer.disable_adapters

    @property
    def routes_by_task(self) -> bool:
        """Whether the method treats tasks differently: all adapters are of one method."""
        return any(shared.routes for shared in self.ept_task_tables.values())

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

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the wrapped model: take ``task_ids`` out of the call, put them beside it."""
        task_ids = kwargs.pop("task_ids", None)
        x = main_input(args, kwargs)
        several = any(shared.num_tasks > 1 for shared in self.ept_task_tables.values())
        needs_tasks = several and task_ids is None and self.routes_by_task
        outer = current() if needs_tasks or not torch.compiler.is_compiling() else None  # Dynamo cannot read it
        if outer is not None and outer.owner is module:  # left by a pass that Ctrl-C ended: hooks see no such end
            pop(outer)
            outer = current()
        inherits = outer is not None and several and task_ids is None
        if self.merged_task is not None and self._disabled():
            self.unmerge_adapter()
        if outer is not None and inherits:
            entries = self._inherited(outer, self.find_out(outer.task_ids, args, kwargs), x, kwargs)
        else:
            entries = entries_of(self.find_out(task_ids, args, kwargs), x, kwargs)
        merged_task = self.merged_task
        by_merge = merged_task is not None and entries.ids is None and self.routes_by_task
        resolved = merged_task if by_merge else self.resolve_tasks(entries.ids, self._expected(entries, x, outer))
        if merged_task is not None and resolved is not None and self.routes_by_task:
            check_merged_task(resolved, merged_task)
        config = self.peft_config.get(next(iter(self.active_adapters), ""))
        pools, sums = (False, False)
        if self.training and config is not None:
            pools, sums = method_of(config).adapter.collects(config)
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
            if entries.shape is not None and "position_ids" in kwargs and takes(module, "use_cache"):
                kwargs.setdefault("use_cache", False)  # transformers keeps packed samples apart only without a cache
        if self.training:
            checkpoint_with_tasks(module)
            if entries.shape is None:
                self._observe(resolved, args, kwargs)
        push(context)
        if takes(module, "task_ids"):
            tokens: Any = context.task_ids
            kwargs["task_ids"] = resolved if entries.shape is None else tokens.view(entries.shape)
        self._trained = context if pools or sums else None
        return args, kwargs

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
        """How many ids there must be; None where nobody knows, or ``_spread`` looks after it."""
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

    # ---- losses

    def adapters(self, adapter_name: str) -> dict[str, LayerAdapter]:
        """The adapter of every adapted layer, by the layer's name in the base model."""
        return {
            path: module.ept_adapters[adapter_name]
            for path, module in self.model.named_modules()
            if isinstance(module, EPTLinearLayer) and adapter_name in module.ept_adapters
        }

    def auxiliary_losses(self) -> WeightedLosses:
        """The method's own losses of the last training forward, with their weights. See ``ept.auxiliary_losses``."""
        name = self.active_adapters[0]
        config, shared, adapters = self.peft_config[name], self.ept_task_tables[name], self.adapters(name)
        weights = [option for option in ("contrastive_weight", "orthogonality_weight") if getattr(config, option, 0)]
        parameters = (parameter for part in (shared, *adapters.values()) for parameter in part.parameters())
        if weights and any(parameter.dim() < 2 for parameter in parameters):  # every one is a matrix, or more
            raise ValueError(
                f"{weights[0]} is {getattr(config, weights[0])}, but FSDP1 shards this model and has whole parameters "
                "inside its forward pass alone: use FSDP2, or set the weight to 0"
            )
        return method_of(config).adapter.losses(config, shared, adapters, self._trained)

    # ---- tasks added later

    def _own_config(self, adapter_name: str) -> Any:
        """The adapter's config, to be changed: a copy, for other adapters and models may have been made with it."""
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        return config

    def add_task(
        self,
        name: str | None = None,
        *,
        like: int | str | None = None,
        new_kernels: Sequence[int] = (),
        adapter_name: str | None = None,
    ) -> int:
        """Add a task to a trained EPT adapter: what is new will train alone, and no other task's output changes.

        New are its embedding and, where ``new_kernels`` asks for them, experts of its own in every layer. Seed,
        kernels, gates and the other tasks' embeddings are frozen, and stay so when the adapter is saved and
        loaded (``config.finished_tasks``). Make the optimizer afterwards: an earlier one does not know the embedding.
        So are other modules that train with the adapter (``modules_to_save``), but for a head of the new task's own
        (``ept.training.add_task`` makes one).

        Args:
            name: of the task, where the adapter names its tasks; None where it does not.
            like: the task whose embedding it starts from. None: the mean of all.
            new_kernels: kernel sizes of experts that this task and later ones may use beside the others, in every
                layer; of scales that every layer has, since the seed is cut for those. They begin at zero and with
                half of the task's weight or more: ``like`` is where its embedding starts then, not its output.
            adapter_name: default: the active one.

        Returns:
            The new task's id.

        Raises:
            ValueError: not an EPT adapter, a merged one, a name that is taken, missing, "auto" or needless, an unknown
                task ``like``, a scale that a layer lacks, a model with a head for every task, or several active
                adapters and none named; nothing has changed then.
        """
        if hasattr(self.model, "add_task"):
            raise ValueError(
                f"add_task: the model ({type(self.model).__name__}) has a part of its own for every task; "
                "ept.training.add_task(model, spec) adds both"
            )
        return self.append_task(name, like, new_kernels, adapter_name)

    def append_task(
        self, name: str | None, like: int | str | None, new_kernels: Sequence[int], adapter_name: str | None = None
    ) -> int:
        """``add_task`` to the adapter alone, for whoever adds the model's own part."""
        if adapter_name is None and len(self.active_adapters) > 1:
            raise ValueError(f"adapter_name must name one of the active adapters {self.active_adapters}, got None")
        adapter_name = adapter_name or self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name must be one of {list(self.peft_config)}, got {adapter_name!r}")
        config, shared = self.peft_config[adapter_name], self.ept_task_tables[adapter_name]
        if not hasattr(config, "finished_tasks"):
            raise ValueError(f"add_task is not supported by {config.peft_type}")
        if not shared.routes:
            raise ValueError("add_task: with routing='token' there is no task table to add to; every task is served")
        if self.merged_task is not None:
            raise ValueError(f"add_task: task {self.merged_task} is merged into the weights; unmerge it first")
        names = config.task_names
        if names is None and name is not None:
            raise ValueError(f"name must be None, since the adapter's tasks have no names, got {name!r}")
        if names is not None and (not isinstance(name, str) or name in ("", AUTO, *names)):
            raise ValueError(f'name must be a new name, none of "", "auto", {", ".join(names)}; got {name!r}')
        try:
            start = None if like is None else shared.resolve(like)
        except (TypeError, ValueError) as error:
            raise ValueError(f"like={like!r} must be None or one of the tasks: {error}") from None
        if not (start is None or isinstance(start, int)):
            raise ValueError(f"like must be one id or name, got {like!r}")
        layers: Any = self.adapters(adapter_name)  # pyramids, as ``finished_tasks`` shows
        try:
            sizes = check_kernel_sizes(new_kernels) if new_kernels != () else ()
        except ValueError as error:
            raise ValueError(f"new_kernels={new_kernels!r} must hold kernel sizes: {error}") from None
        for layer, adapter in layers.items():
            try:
                adapter.check_scales(sizes)
            except ValueError as error:
                raise ValueError(f"new_kernels={new_kernels!r} does not fit layer {layer!r}: {error}") from None
        finished = shared.num_tasks
        task = shared.add_task(name, start)
        config = self._own_config(adapter_name)
        config.num_tasks, config.finished_tasks = finished + 1, finished
        if names is not None:
            config.task_names = [*names, name]
        trains = adapter_name in self.active_adapters and not config.inference_mode
        if sizes:
            config.added_kernels = (*(config.added_kernels or ()), (task, sizes))
            for adapter in layers.values():
                adapter.add_experts(task, sizes)
                if not trains:
                    adapter.requires_grad_(False)
        self.freeze_finished()
        shared.requires_grad_(trains)
        return task

    def freeze_finished(self) -> None:
        """Freeze what finished tasks use, again: PEFT makes all of an adapter trainable when it loads or activates one.

        Done wherever that happens, and when training begins (``train()``, ``ept.parameter_groups``).

        A module to save that has parts of its own for every task says so by ``finish(count)``.
        """
        counts = {name: getattr(config, "finished_tasks", 0) for name, config in self.peft_config.items()}
        for name, count in counts.items():
            if not count:
                continue
            table: Any = self.ept_task_tables[name]
            table.freeze_finished_rows()
            pyramids: Any = self.adapters(name).values()
            for adapter in pyramids:
                adapter.finish(count)
            if self.peft_config[name].bias != "none":
                for path, parameter in self.model.named_parameters():
                    if path.endswith("bias") and not any(part in path for part in (".modules_to_save.", ".ept_")):
                        parameter.requires_grad_(False).grad = None
            for wrapper in self.model.modules():
                if isinstance(wrapper, TrainableTokensWrapper):
                    rows: Any = wrapper.token_adapter.trainable_tokens_delta
                    if name in rows:
                        rows[name].requires_grad_(False).grad = None
                if not isinstance(wrapper, ModulesToSaveWrapper) or name not in wrapper.modules_to_save:
                    continue
                saved: Any = wrapper.modules_to_save[name]
                if hasattr(saved, "finish"):
                    saved.finish(count)
                else:
                    saved.requires_grad_(False).zero_grad()

    # ---- adapters by name

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, shared in self.ept_task_tables.items():
            shared.requires_grad_(name in names and not inference_mode)
        self.freeze_finished()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        for name, shared in self.ept_task_tables.items():  # as PEFT does with the layers
            shared.requires_grad_(enabled and name in self.active_adapters)
        self.freeze_finished()

    def train(self, mode: bool = True) -> EPTModel:
        """As in ``nn.Module``; what finished tasks use stays frozen."""
        super().train(mode)
        if mode:
            self.freeze_finished()
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.ept_task_tables[adapter_name]
        self._set_table_gradients()

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._set_table_gradients()
        self.freeze_finished()

    def _set_table_gradients(self) -> None:
        for name, shared in self.ept_task_tables.items():
            shared.requires_grad_(name in self.active_adapters and not self.peft_config[name].inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.ept_task_tables:
                self.ept_task_tables[name].requires_grad_(requires_grad)
        self.freeze_finished()

    # ---- merging

    def _tuner_layers(self) -> list[Any]:
        """The adapted layers, and those that PEFT makes itself: trained rows of an embedding, which know no tasks."""
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, task: int | str | None = None
    ) -> None:
        """Put one task's updates into the base weights; ``unmerge_adapter`` takes them out to the bit.

        Adapters may be merged one after the other, for the same task. One that is merged already is passed over with a
        warning.

        Args:
            adapter_names: default: the active ones.
            task: id or name; None where there is one task, or one is merged.

        Raises:
            ValueError: a method that does not merge, no task given with more than one, an unknown task, another one
                than is merged, a weight that is computed at every call or shared with another module, or a result that
                is not finite; no weight has changed then.
        """
        self._check_merge_allowed()
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in names:
            self.check_mergeable(name)
        merged = self.merged_task
        task = merged if task is None else task
        tasks = [self.ept_task_tables[name].resolve(task) for name in names if name in self.ept_task_tables]
        if not tasks or not isinstance(tasks[0], int):
            raise ValueError(f"task must be one id or name for an adapter among {list(self.peft_config)}, got {task!r}")
        if len(set(tasks)) > 1:
            raise ValueError(f"task={task!r} means different tasks to the adapters {list(names)}; give an id")
        if merged not in (None, tasks[0]):
            raise ValueError(f"task={task!r}, but task {merged} is already merged; call unmerge_adapter first")
        layers = self._tuner_layers()
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            for layer in layers:
                _merge_layer(layer, adapter_names, tasks[0], safe_merge)
        except BaseException:  # Ctrl-C as well: half a merged model would answer for another task
            for layer, had in zip(layers, before, strict=True):
                if layer.merged_adapters != had:
                    layer.unmerge()
                    if had:
                        _merge_layer(layer, had, merged)
            raise
        self._merged = tuple(layer for layer in layers if isinstance(layer, EPTLinearLayer) and layer.merged)[:1]

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError where a task of an adapter cannot be put into the weights exactly, naming the layer."""
        adapters = self.adapters(adapter_name)
        tied = tied_layers(self.model, adapters)
        for layer, adapter in adapters.items():
            adapter.check_mergeable()
            module: Any = self.model.get_submodule(layer)
            module.tied_to = tied.get(layer)
            module.check_own_weight(layer)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        task: int | str | None = None,
    ) -> nn.Module:
        """The base model with one task's updates in its weights and no trace of the adapter.

        What is merged already stays so, as in PEFT.

        Raises:
            ValueError: as ``merge_adapter``.
        """
        merged = {name for module in self._tuner_layers() for name in module.merged_adapters}
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.merged_task is not None and task is not None and self.routes_by_task:
            check_merged_task(self.ept_task_tables[self.active_adapters[0]].resolve(task), self.merged_task)
        if not merged or not merged.issuperset(names):
            self.merge_adapter([name for name in names if name not in merged], safe_merge, task=task)
        return self._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        if self.merged_task is not None:
            self.unmerge_adapter()
        return super().unload()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # PEFT's version wants every trained module to have a weight
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        unfollow(model)
        model.__dict__.pop("generate", None)
        return model

    # ---- checkpoints

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in ("ept_adapters", "ept_task_tables"):
            key = key.replace(f"{container}.{adapter_name}.", f"{container}.")
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marker = f".{adapter_name}."
        expected = {
            key: tensor
            for key, tensor in model.state_dict().items()
            if any(part + marker in key for part in (".ept_adapters", "ept_task_tables", ".modules_to_save"))
        }
        whole, ignores_sizes = loading_options()
        check_adapter_state(expected, remapped, partial=not whole, ignore_sizes=ignores_sizes)
        ept_model(model).freeze_finished()  # of modules that are saved with the adapter, too: they are there only now
        return remapped


def _merge_layer(layer: Any, names: list[str] | None, task: int | None, safe_merge: bool = False) -> None:
    if isinstance(layer, EPTLinearLayer):
        layer.merge(safe_merge, names, task=task)
    else:
        layer.merge(safe_merge, names)


def ept_model(model: nn.Module) -> EPTModel:
    """The tuner of one of this package's methods inside ``model``.

    Raises:
        ValueError: there is none.
    """
    candidates = (model, getattr(model, "base_model", None), getattr(model, "module", None))
    for candidate in candidates:
        if isinstance(candidate, PeftModel):
            candidate = candidate.base_model
        if isinstance(candidate, EPTModel):
            return candidate
    raise ValueError(f"model must be a PeftModel with an EPT adapter, got {type(model).__name__}")
