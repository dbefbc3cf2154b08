"""Autocast, for code that chooses its own precisions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


# torch 2.6 cannot trace the question.
@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block in which autocast leaves ``device`` alone; nothing on a device that has no autocast, such as meta."""
    if _has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would cast ``tensor`` for a matrix product, or None where it would not."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not (tensor.is_cpu or tensor.is_cuda or _has_autocast(device)):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
