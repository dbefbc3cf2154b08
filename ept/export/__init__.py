"""Trained adapters for servers that know nothing of this package: merged models, small deltas, LoRA."""

from .deltas import TaskDeltas, apply_delta, export_deltas, load_deltas
from .lora import LoraLayer, LoraReport, export_lora
from .merged import export_merged

__all__ = [
    "LoraLayer",
    "LoraReport",
    "TaskDeltas",
    "apply_delta",
    "export_deltas",
    "export_lora",
    "export_merged",
    "load_deltas",
]
