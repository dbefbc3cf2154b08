"""EPT's entry in PEFT's closed registry of methods.

``peft.PeftType`` is an enum, and an enum with members cannot be extended; ``register_peft_method`` refuses other
names. Every table that PEFT keys by it (config, tuner and prefix mappings) is however a plain dict, and ``PeftType``
members are strings: a string key serves as well, and needs no change to PEFT's files or classes.

One more door is closed: the forward methods of ``PeftModelForCausalLM`` and its five siblings take ``task_ids`` from
any caller, but hand them to the tuner only where ``peft_type == PeftType.POLY``, PEFT's own method that routes by task.
EPT routes by task too, so its type answers yes to that comparison. It is the only place where PEFT compares with POLY;
the hash stays that of "EPT", so no table is affected. The alternative was to replace those six methods for every PEFT
user.
"""

from __future__ import annotations

from peft.utils.peft_types import PeftType


class TaskRoutedPeftType(str):
    """A PEFT type whose models take ``task_ids`` in forward and generate."""

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
