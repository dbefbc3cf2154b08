"""``AdapterConfig``: the hyperparameters that every method of this package has."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from .rows import LAYOUTS

#: No size of an adapter is larger: that of a damaged config is refused before anybody asks for so much memory.
LARGEST_SIZE = 2**16


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
        layers_to_transform, layers_pattern: restrict to these layer indices, as in ``LoraConfig``.
        modules_to_save: other modules to train and to save with the adapter, such as a classification head.
        row_layout: how the rows run that some layers of a model see, where batches mix tasks and nothing else tells:
            ``{pattern: "batch_first", "batch_second" or "rows"}``, with patterns as in ``LoraConfig.rank_pattern``; see
            ``ept.row_layout`` and ``docs/rows.md``.

    Raises:
        ValueError: a value out of its range; the message names the argument, the value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank of the update's factors."})
    lora_alpha: float = field(default=32, metadata={"help": "The update is scaled by lora_alpha / r."})
    num_tasks: int = field(default=8, metadata={"help": "How many tasks there are."})
    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, by id."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules never to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    row_layout: dict[str, str] | None = field(default=None, metadata={"help": "How the rows of some layers run."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("r", self.r)
        check(
            is_number(self.lora_alpha) and self.lora_alpha > 0,
            f"lora_alpha must be a number > 0, got {self.lora_alpha!r}",
        )
        self._check_tasks()
        check(
            is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
            f"lora_dropout must be a number in [0, 1), got {self.lora_dropout!r}",
        )
        self._check_targets()
        self._check_layouts()

    def layout_of(self, name: str) -> str | None:
        """What ``row_layout`` says of the layer ``name`` of a model."""
        patterns = self.row_layout or {}
        return patterns.get(get_pattern_key(list(patterns), name))

    def for_layer(self, name: str) -> AdapterConfig:
        """The config of the layer ``name`` of a model: this one, unless a method lets layers differ."""
        return self

    def _check_targets(self) -> None:
        """What PEFT takes on trust."""
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if value is None or (isinstance(value, str) and name != "modules_to_save"):
                continue
            names = isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)
            check(names, f"{name} must be None or a list of strings, got {value!r}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"{name}={value!r} is not a regular expression: {error}") from None
            elif value is not None:
                setattr(self, name, set(value))
        layers = self.layers_to_transform
        check(
            layers is None or is_int(layers) or (isinstance(layers, (list, tuple, set)) and all(map(is_int, layers))),
            f"layers_to_transform must be None, an integer or a list of integers, got {layers!r}",
        )

    def _check_layouts(self) -> None:
        given = self.row_layout
        wanted = f"row_layout must be None or {{pattern: one of {', '.join(LAYOUTS)}}}, got {given!r}"
        check(given is None or (isinstance(given, dict) and all(isinstance(key, str) for key in given)), wanted)
        for pattern, layout in (given or {}).items():
            check(isinstance(layout, str) and layout in LAYOUTS, wanted)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"row_layout[{pattern!r}] is not a regular expression: {error}") from None

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
