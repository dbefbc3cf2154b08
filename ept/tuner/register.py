"""Make PEFT know the methods: importing ``ept`` is all that a saved adapter needs (``peft_type`` says how and why)."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from ..methods import METHODS
from .model import EPTModel


def register() -> None:
    """Add every method to PEFT's tables. Safe to call twice."""
    for method in METHODS:
        PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type] = method.config
        PEFT_TYPE_TO_TUNER_MAPPING[method.peft_type] = EPTModel
        PEFT_TYPE_TO_PREFIX_MAPPING[method.peft_type] = EPTModel.prefix
