"""The configs: what every adapter has (``AdapterConfig``), the contrastive loss, and Expert Pyramid Tuning."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.config import PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from ept_kernels.geometry import check_kernel_sizes

from .rows import LAYOUTS

if TYPE_CHECKING:
    from typing_extensions import Self


class TaskRoutedPeftType(str):
    """A PEFT type whose models take ``task_ids`` in forward and generate.

    ``peft.PeftType`` is an enum, and an enum with members cannot be extended; ``register_peft_method`` refuses other
    names. But every table that PEFT keys by it (config, tuner and prefix mappings) is a plain dict, and ``PeftType``
    members are strings, so a string key works and needs no change to PEFT's files or classes.

    The forward methods of ``PeftModelForCausalLM`` and its five siblings take ``task_ids`` from any caller, but pass
    them to the tuner only where ``peft_type == PeftType.POLY``, PEFT's own method that routes by task. The methods here
    route by task too, so their type is equal to POLY. PEFT compares with POLY nowhere else, and the hash stays that of
    the string, so no table is affected. The alternative was to replace those six methods for every PEFT user.
    """

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        """As of a member of ``PeftType``: PEFT's ``get_model_status`` reports what follows the dot."""
        return f"PeftType.{self.value}"

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __eq__(self, other: object) -> bool:
        return other is PeftType.POLY or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self)


EPT = TaskRoutedPeftType("EPT")

#: No size of an adapter is larger: that of a damaged config is refused before anybody asks for so much memory.
LARGEST_SIZE = 2**16

#: Which biases may train.
BIASES = ("none", "all", "ept_only")

#: As ``target_modules``: every linear layer but the head.
ALL_LINEAR = "all-linear"


class NotALoRAError(AttributeError, ValueError):
    """A config was asked for an attribute of a LoRA's; an ``AttributeError`` too, so that ``hasattr`` is False."""


def check(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition``."""
    if not condition:
        raise ValueError(message)


def is_int(value: object) -> bool:
    """Whether ``value`` is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number in fp32, and not a truth value."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= torch.finfo(torch.float32).max


def check_size(name: str, value: Any, allowed: str = "an integer >= 1") -> None:
    """Raise a ValueError unless ``value`` is an integer from 1 to ``LARGEST_SIZE``."""
    check(is_int(value) and value >= 1, f"{name} must be {allowed}, got {value!r}")
    check(value <= LARGEST_SIZE, f"{name} must be at most {LARGEST_SIZE}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a number > 0."""
    check(is_number(value) and value > 0, f"{name} must be a number > 0, got {value!r}")


def check_weight(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a number >= 0."""
    check(is_number(value) and value >= 0, f"{name} must be a number >= 0, got {value!r}")


def _check_expression(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} is not a regular expression: {error}") from None


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and not value)


@dataclass
class AdapterConfig(PeftConfig):
    """Rank, scale, tasks, dropout and targets of an adapter; a method's own config adds the rest.

    Args:
        r: rank of the update's factors.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        num_tasks: how many tasks there are. Taken from ``task_names`` where that is given.
        task_names: optional names, in the order of the ids; then ``task_ids`` may be given by name.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        target_modules: names or a regular expression of the modules to adapt, or "all-linear". None: PEFT's default for
            the architecture.
        exclude_modules: names or a regular expression of modules never to adapt.
        layers_to_transform, layers_pattern: restrict to these layer indices, as in ``LoraConfig``; not with a regular
            expression, which can say it itself.
        modules_to_save: other modules to train and to save with the adapter, such as a classification head.
        rank_pattern, alpha_pattern: other ``r`` and ``lora_alpha`` for some layers, as in ``LoraConfig``.
        trainable_token_indices: rows of the embedding to train for all tasks, as in ``LoraConfig``.
        bias: which biases of the base train, for all tasks alike: "none", "all", or "ept_only" for those of adapted
            layers.
        target_parameters, layer_replication: None; nothing else is allowed.
        row_layout: how the rows run that some layers of a model see, where batches mix tasks and nothing else tells:
            ``{pattern: "batch_first", "batch_second" or "rows"}``, with patterns as in ``LoraConfig.rank_pattern``; see
            ``ept.row_layout`` and ``docs/rows.md``.

    Raises:
        ValueError: a value out of its range; the message names the argument, the value and what is allowed.
    """

    r: int = 8
    lora_alpha: float = 32
    num_tasks: int = 8
    task_names: list[str] | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: str = "none"
    target_parameters: list[str] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    row_layout: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("r", self.r)
        check_positive("lora_alpha", self.lora_alpha)
        self._check_tasks()
        check(
            is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
            f"lora_dropout must be a number in [0, 1), got {self.lora_dropout!r}",
        )
        self._check_targets()
        self._check_patterns()
        self._check_beside()
        self._check_layouts()

    def layout_of(self, name: str) -> str | None:
        """What ``row_layout`` says of the layer ``name`` of a model."""
        patterns = self.row_layout or {}
        return patterns.get(get_pattern_key(list(patterns), name))

    @property
    def runtime_config(self) -> Any:
        """Always refused; X-LoRA asks for it, which takes every adapter for a LoRA."""
        raise NotALoRAError(
            f"{type(self).__name__} configures no LoRA, and here a LoRA is needed (X-LoRA mixes several): "
            "ept.export_lora writes one task as a LoRA"
        )

    def for_layer(self, name: str) -> Self:
        """The config of the layer ``name`` of a model: this one, with what the patterns give that layer.

        Raises:
            ValueError: a rank or scale that does not fit the other arguments.
        """
        own = {}
        for argument, patterns in (("r", self.rank_pattern), ("lora_alpha", self.alpha_pattern)):
            key = get_pattern_key(list(patterns), name)
            if key in patterns:
                own[argument] = patterns[key]
        if not own:
            return self
        config = copy.copy(self)
        config.rank_pattern, config.alpha_pattern = {}, {}
        for argument, value in own.items():
            setattr(config, argument, value)
        config.__post_init__()
        return config

    def _check_targets(self) -> None:
        """Check what PEFT does not."""
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if value is None or (isinstance(value, str) and name != "modules_to_save"):
                continue
            names = isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)
            check(names, f"{name} must be None or a list of strings, got {value!r}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_expression(f"{name}={value!r}", value)
            elif value is not None:
                setattr(self, name, set(value))
        layers = self.layers_to_transform
        check(
            layers is None or is_int(layers) or (isinstance(layers, (list, tuple, set)) and all(map(is_int, layers))),
            f"layers_to_transform must be None, an integer or a list of integers, got {layers!r}",
        )
        self._check_layers()

    def _check_layers(self) -> None:
        """Refuse restrictions to layers that would have no effect; in a saved config, warn of them."""
        restricts = self.layers_to_transform is not None and self.layers_to_transform != []
        targets = self.target_modules
        if self.layers_pattern and not restricts:
            self._without_effect(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, got {self.layers_to_transform!r}"
            )
        elif restricts and isinstance(targets, str) and targets.lower() != ALL_LINEAR:
            self._without_effect(
                f"layers_to_transform={self.layers_to_transform!r} cannot restrict target_modules={targets!r}, a "
                "regular expression: let it match the wanted layers alone, or give a list of names"
            )

    def _without_effect(self, message: str) -> None:
        if not self.inference_mode:  # as every config that was saved is
            raise ValueError(message)
        warnings.warn(f"{message}; it has no effect", RuntimeWarning, stacklevel=2)

    def _check_patterns(self) -> None:
        for name, argument in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            pattern = {} if getattr(self, name) is None else getattr(self, name)
            check(isinstance(pattern, dict), f"{name} must be {{pattern: {argument}}}, got {pattern!r}")
            for key, value in pattern.items():
                _check_expression(f"{name}[{key!r}]", key)
                if argument == "r":
                    check_size(f"{name}[{key!r}]", value)
                else:
                    check_positive(f"{name}[{key!r}]", value)
            setattr(self, name, dict(pattern))

    def _check_beside(self) -> None:
        """Check what trains beside the adapter; refuse arguments of ``LoraConfig`` that no method here supports."""
        check(
            isinstance(self.bias, str) and self.bias in BIASES,
            f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}",
        )
        check(
            _is_nothing(self.target_parameters),
            f"target_parameters must be None, got {self.target_parameters!r}: an adapter needs a module whose input it "
            "sees, not a parameter; name modules in target_modules",
        )
        check(
            _is_nothing(self.layer_replication),
            f"layer_replication must be None, got {self.layer_replication!r}: replicate the layers of the base before "
            "it is adapted",
        )
        tokens = self.trainable_token_indices
        rows = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
        check(
            all(isinstance(ids, (list, tuple)) and all(is_int(row) and row >= 0 for row in ids) for ids in rows)
            and (not isinstance(tokens, dict) or all(isinstance(name, str) for name in tokens)),
            "trainable_token_indices must be None, a list of integers >= 0 or {name of an embedding: such a list}, "
            f"got {tokens!r}",
        )

    def _check_layouts(self) -> None:
        given = self.row_layout
        wanted = f"row_layout must be None or {{pattern: one of {', '.join(LAYOUTS)}}}, got {given!r}"
        check(given is None or (isinstance(given, dict) and all(isinstance(key, str) for key in given)), wanted)
        for pattern, layout in (given or {}).items():
            check(isinstance(layout, str) and layout in LAYOUTS, wanted)
            _check_expression(f"row_layout[{pattern!r}]", pattern)

    def _check_tasks(self) -> None:
        if self.task_names is not None:
            given = self.task_names
            names = [given] if isinstance(given, str) else list(given) if isinstance(given, (list, tuple)) else []
            check(
                bool(names) and all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names),
                f"task_names must be distinct, non-empty strings, got {self.task_names!r}",
            )
            check("auto" not in names, 'task_names must not hold "auto", which asks for the task to be found out')
            self.task_names = names
            default = type(self).__dataclass_fields__["num_tasks"].default
            check(
                self.num_tasks in (default, len(names)),
                f"num_tasks={self.num_tasks!r} contradicts the {len(names)} task_names; leave one of them out",
            )
            self.num_tasks = len(names)
        check_size("num_tasks", self.num_tasks)


#: Below it, logits (a cosine over the temperature) and their gradients leave the range of fp32.
LEAST_TEMPERATURE = 1e-6


@dataclass
class ContrastiveConfig(AdapterConfig):
    """``AdapterConfig`` with a table of task embeddings, placed by a contrastive loss (spec section 3).

    Args (beyond those of ``AdapterConfig``):
        task_embedding_dim: width of a task embedding. None: the commonest input width among the adapted layers, so that
            the contrastive loss can compare the embeddings with representations.
        task_similarity: expected cosine of two tasks' embeddings at the start, in [0, 1): how much the tasks begin
            alike.
        temperature: of the contrastive loss's cosine similarities.
        contrastive_weight: weight of the contrastive loss in the total; 0 switches it off.
    """

    task_embedding_dim: int | None = None
    task_similarity: float = 0.75
    temperature: float = 0.05
    contrastive_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_embedding_dim is not None:
            check_size("task_embedding_dim", self.task_embedding_dim, "None or an integer >= 1")
        check(
            is_number(self.task_similarity) and 0 <= self.task_similarity < 1,
            f"task_similarity must be a number in [0, 1), got {self.task_similarity!r}",
        )
        check_positive("temperature", self.temperature)
        check(
            self.temperature >= LEAST_TEMPERATURE,
            f"temperature must be at least {LEAST_TEMPERATURE}, got {self.temperature!r}",
        )
        check_weight("contrastive_weight", self.contrastive_weight)


@dataclass
class EPTConfig(ContrastiveConfig):
    """Configuration of Expert Pyramid Tuning (arXiv 2603.12577).

    Args:
        r: rank of the shared seed ``Z = B @ A``.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        kernel_sizes: the pyramid: one entry per expert, its deconvolution kernel's size.
        kernel_pattern: other kernel sizes for some layers of a model: ``{pattern: kernel_sizes}``, where a pattern is a
            regular expression for the end of a layer's name, as in ``LoraConfig.rank_pattern``; the first that matches
            counts. A layer without a model, such as an ``EPTLinear``, takes ``kernel_sizes``.
        top_k: experts that the router mixes for a task.
        num_tasks: rows of the task-embedding table. Taken from ``task_names`` where that is given.
        task_names: optional names, in the order of the ids; then ``task_ids`` may be given by name.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        alp_scaling: multiply scale ``k`` by ``ceil(out / k) / ceil(out / k_min)``; False is the ablation "w/o ALP".
        task_embedding_dim: width of a task embedding. None: the commonest input width among the adapted layers, so that
            the contrastive loss can compare the embeddings with representations.
        task_similarity: expected cosine of two tasks' embeddings at the start, in [0, 1): how much the tasks begin with
            the same experts.
        temperature: of the contrastive loss's cosine similarities.
        contrastive_weight: weight of the contrastive loss in the total; 0 switches it off.
        auto_routing: keep statistics of each task's token embeddings during training, so that ``task_ids="auto"`` can
            find out the task of an unlabelled sample afterwards (``docs/tasks.md``).
        finished_tasks: the first so many tasks are finished: neither their embeddings nor anything that all tasks use
            trains. Set by ``model.add_task``.
        added_kernels: experts that came with tasks added later, ``((task, kernel sizes), ...)``: they follow those of
            ``kernel_sizes`` in every layer, and earlier tasks know nothing of them. Set by
            ``model.add_task(new_kernels=...)``.
        init_seed: "gaussian" (the method) or "zero" (the paper's ablation: ``B`` starts at zero).
        routing: "task" (the method): a task's embedding selects its experts. "token": every token selects its own, by a
            gate ``[E, in]`` on its own input. Then there are no task embeddings, ``task_ids`` are optional and change
            nothing, ``contrastive_weight`` is 0, and nothing can be merged.
        target_modules: names or a regular expression of the modules to adapt, or "all-linear". None: PEFT's default for
            the architecture.
        exclude_modules: names or a regular expression of modules never to adapt.
        layers_to_transform, layers_pattern: restrict to these layer indices, as in ``LoraConfig``; not with a regular
            expression, which can say it itself.
        modules_to_save: other modules to train and to save with the adapter, such as a classification head.
        rank_pattern, alpha_pattern, trainable_token_indices, bias, target_parameters, layer_replication: as in
            ``AdapterConfig``.
        row_layout: how the rows run that some layers see, as in ``AdapterConfig``.

    Raises:
        ValueError: a value out of its range; the message names the argument, the value and what is allowed.
    """

    kernel_sizes: tuple[int, ...] = (2, 2, 4, 4, 6, 6, 8, 8)
    kernel_pattern: dict[str, tuple[int, ...]] | None = None
    top_k: int = 2
    alp_scaling: bool = True
    auto_routing: bool = False
    finished_tasks: int = 0
    added_kernels: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    init_seed: str = "gaussian"
    routing: str = "task"

    def __post_init__(self) -> None:
        self.kernel_sizes = check_kernel_sizes(self.kernel_sizes)
        super().__post_init__()
        self.peft_type = EPT
        self._check_pattern()
        self._check_added()
        fewest = min((self.kernel_sizes, *(self.kernel_pattern or {}).values()), key=len)
        check(
            is_int(self.top_k) and 1 <= self.top_k <= len(fewest),
            f"top_k must be an integer from 1 to {len(fewest)} (the experts of {fewest}), got {self.top_k!r}",
        )
        check(isinstance(self.alp_scaling, bool), f"alp_scaling must be True or False, got {self.alp_scaling!r}")
        check(isinstance(self.auto_routing, bool), f"auto_routing must be True or False, got {self.auto_routing!r}")
        check(
            is_int(self.finished_tasks) and 0 <= self.finished_tasks <= self.num_tasks,
            f"finished_tasks must be an integer from 0 to num_tasks={self.num_tasks}, got {self.finished_tasks!r}",
        )
        check(
            isinstance(self.init_seed, str) and self.init_seed in ("gaussian", "zero"),
            f"init_seed must be 'gaussian' or 'zero', got {self.init_seed!r}",
        )
        check(
            isinstance(self.routing, str) and self.routing in ("task", "token"),
            f"routing must be 'task' or 'token', got {self.routing!r}",
        )
        if self.routing == "token":
            check(self.added_kernels is None, "added_kernels must be None with routing='token', which has no tasks")
            check(not self.auto_routing, "auto_routing must be False with routing='token', which asks for no tasks")
            check(self.finished_tasks == 0, "finished_tasks must be 0 with routing='token', which has no task table")
            default = type(self).__dataclass_fields__["contrastive_weight"].default
            check(
                self.contrastive_weight in (0, default),
                "contrastive_weight must be 0 or left out with routing='token', which has no task embeddings to train; "
                f"got {self.contrastive_weight!r}",
            )
            self.contrastive_weight = 0.0

    def _check_pattern(self) -> None:
        pattern = self.kernel_pattern
        if pattern is None:
            return
        check(isinstance(pattern, dict), f"kernel_pattern must be None or {{pattern: kernel sizes}}, got {pattern!r}")
        sizes = {}
        for key, value in pattern.items():
            try:
                re.compile(key)
                sizes[key] = check_kernel_sizes(value)
            except (re.error, TypeError, ValueError) as error:
                raise ValueError(f"kernel_pattern[{key!r}]={value!r}: {error}") from None
        self.kernel_pattern = sizes or None

    def _check_added(self) -> None:
        added = self.added_kernels
        if added is None:
            return
        wanted = f"added_kernels must be None or ((task, kernel sizes), ...), got {added!r}"
        try:
            pairs = tuple((task, check_kernel_sizes(sizes)) for task, sizes in added)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{wanted}: {error}") from None
        tasks = [task for task, _ in pairs]
        check(
            all(is_int(task) and 0 < task < self.num_tasks for task in tasks) and tasks == sorted(set(tasks)),
            f"{wanted}: tasks must be different, from 1 to {self.num_tasks - 1}, and in their order",
        )
        self.added_kernels = pairs or None

    @property
    def all_kernel_sizes(self) -> tuple[int, ...]:
        """Of every expert: ``kernel_sizes``, then those of ``added_kernels``."""
        return self.kernel_sizes + tuple(k for _, sizes in self.added_kernels or () for k in sizes)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """``(first task, number of experts)`` of each group of tasks that knows the same experts, in their order."""
        found = [(0, len(self.kernel_sizes))]
        for task, sizes in self.added_kernels or ():
            found.append((task, found[-1][1] + len(sizes)))
        return tuple(found)

    def for_layer(self, name: str) -> Self:
        """As in ``AdapterConfig``, with the kernel sizes that ``kernel_pattern`` gives the layer."""
        config = super().for_layer(name)
        key = get_pattern_key(list(self.kernel_pattern or ()), name)
        if self.kernel_pattern is None or key not in self.kernel_pattern:
            return config
        config = copy.copy(config)
        config.kernel_sizes = self.kernel_pattern[key]
        return config


Sizes = tuple[int, ...]


def shared_and_pattern(sizes: Mapping[str, Sizes]) -> tuple[Sizes, dict[str, Sizes] | None]:
    """``kernel_sizes`` (the commonest) and ``kernel_pattern`` (None if all agree) for kernel sizes by layer's name."""
    ((commonest, _),) = Counter(sizes.values()).most_common(1)
    # Anchored, or a layer "block.0.q" would speak for another's "decoder.block.0.q".
    different = {f"^{re.escape(name)}": own for name, own in sizes.items() if own != commonest}
    return commonest, different or None
