"""Which of a kernel's tile configurations runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence

import torch
import triton

from .launch import Config

#: Fastest configuration by kernel and key, as measured in this process.
_measured: dict[Hashable, Config] = {}


def row_bucket(rows: int) -> int:
    """Rows rounded up to a power of two: batches of similar size share a measurement."""
    return triton.next_power_of_2(rows) if rows else 0


def _tunes(device: torch.device) -> bool:
    """``EPT_TRITON_AUTOTUNE=1`` measures, unless determinism is asked for, a graph is captured, or there is no GPU."""
    if os.environ.get("EPT_TRITON_AUTOTUNE") != "1" or device.type != "cuda":
        return False
    return not (torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing())


def choose(
    key: Hashable, candidates: Sequence[Config], device: torch.device, trial: Callable[[Config], object]
) -> Config:
    """The default, ``candidates[0]``; or, where tuning is on, the fastest of all, measured once for each key.

    Args:
        key: kernel, sizes, dtype and bucketed rows.
        trial: starts the kernel with a configuration; it must write to scratch memory alone.
    """
    if len(candidates) == 1 or not _tunes(device):
        return candidates[0]
    key = (device.index, key)
    if key not in _measured:
        _measured[key] = min(candidates, key=lambda config: triton.testing.do_bench(lambda: trial(config)))
    return _measured[key]
