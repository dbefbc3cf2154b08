"""Which of a kernel's tile configurations runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence

import torch
import triton
from torch import Tensor

from .launch import Config

#: Fastest configuration by kernel and key, as measured in this process.
_measured: dict[Hashable, Config] = {}


def row_bucket(rows: int) -> int:
    """Rows rounded up to a power of two: batches of similar size share a measurement."""
    return triton.next_power_of_2(rows) if rows else 0


def layout(tensor: Tensor) -> tuple[bool, ...]:
    """What decides how wide a tensor's rows can be loaded: whether they are contiguous, and start on 16 bytes."""
    step, stride = tensor.stride(0) * tensor.element_size(), tensor.stride(1)
    return stride == 1, step % 16 == 0, tensor.data_ptr() % 16 == 0


def _tunes(device: torch.device) -> bool:
    """``EPT_TRITON_AUTOTUNE=1`` measures, unless determinism is asked for, a graph is captured, or there is no GPU."""
    if os.environ.get("EPT_TRITON_AUTOTUNE") != "1" or device.type != "cuda":
        return False
    return not (torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing())


def choose(
    key: Callable[[], Hashable],
    candidates: Sequence[Config],
    device: torch.device,
    trial: Callable[[Config], object],
) -> Config:
    """The default, ``candidates[0]``; or, where tuning is on, the fastest of all, measured once for each key.

    Args:
        key: gives kernel, sizes, dtype, bucketed rows, and whatever else the best configuration depends on; called only
            where something is measured.
        trial: starts the kernel with a configuration; it must write to scratch memory alone.
    """
    if len(candidates) == 1 or not _tunes(device):
        return candidates[0]
    known = (device.index, key())
    if known not in _measured:
        _measured[known] = min(candidates, key=lambda config: triton.testing.do_bench(lambda: trial(config)))
    return _measured[known]
