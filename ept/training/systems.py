"""The systems that one trainer compares: this package's methods and PEFT's own LoRA, by the name ``--method`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftConfig

from ept.methods import METHODS
from ept.training.arguments import EPTTrainingArguments


@dataclass(frozen=True)
class System:
    """A system: the class of its configs, the peak learning rate that suits it, and what it starts from.

    Attributes:
        defaults: config fields whose defaults here are not those of ``config``.
    """

    name: str
    config: type[PeftConfig]
    learning_rate: float
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def default(self, name: str) -> Any:
        """Default of a config field, or None where the config has no such field."""
        known = {entry.name: entry.default for entry in fields(self.config)}
        return self.defaults.get(name, known.get(name))

    def has(self, name: str) -> bool:
        """Whether the config has a field of this name."""
        return name in {entry.name for entry in fields(self.config)}

    def make_config(self, task_names: list[str], **options: Any) -> PeftConfig:
        """A config for these tasks; ``options`` are fields of it.

        Raises:
            ValueError: a value out of its range.
        """
        tasks = {"task_names": task_names} if self.has("task_names") else {}
        return self.config(**{**self.defaults, **tasks, **options})


#: Peak learning rates. EPT's is that of its seed; the kernels' is ten times that (``ept.parameter_groups``).
_LEARNING_RATES: dict[str, Any] = {
    "ept": EPTTrainingArguments.__dataclass_fields__["learning_rate"].default,
    "lora": 5e-4,
    "more": 1e-3,
    "moelora": 2e-3,
    "mixlora": 5e-4,
    "dcft": 3e-3,
    "tucka": 6e-3,  # its authors' for GLUE, at the alpha and the rank that are the defaults here
}

_LORA = System("lora", LoraConfig, _LEARNING_RATES["lora"], {"lora_alpha": 32})  # r and scaling as EPT's

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        *(
            System(method.peft_type.lower(), method.config, _LEARNING_RATES[method.peft_type.lower()])
            for method in METHODS
        ),
        _LORA,
    )
}
