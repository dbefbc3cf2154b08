"""Make PEFT know EPT: importing ``ept`` is all that a saved adapter needs to load (``peft_type`` says how and why)."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from ..config import EPTConfig
from ..peft_type import EPT
from .model import EPTModel


def register() -> None:
    """Add EPT to PEFT's tables. Safe to call twice."""
    PEFT_TYPE_TO_CONFIG_MAPPING[EPT] = EPTConfig
    PEFT_TYPE_TO_TUNER_MAPPING[EPT] = EPTModel
    PEFT_TYPE_TO_PREFIX_MAPPING[EPT] = EPTModel.prefix
