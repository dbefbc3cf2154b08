"""Make PEFT know the methods: importing ``ept`` is all that a saved adapter needs (``peft_type`` says how and why)."""

from __future__ import annotations

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from ..methods import METHODS
from .model import EPTModel


def register() -> None:
    """Add every method to PEFT's tables. Safe to call twice."""
    # Declared as keyed by members of PEFT's own enumeration; their names are strings too.
    configs: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: Any = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: Any = PEFT_TYPE_TO_PREFIX_MAPPING
    for method in METHODS:
        configs[method.peft_type] = method.config
        tuners[method.peft_type] = EPTModel
        prefixes[method.peft_type] = EPTModel.prefix
