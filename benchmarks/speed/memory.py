"""Memory of one call: what is kept for the backward pass, and the allocator's peak.

Both count beyond what exists before the call (parameters, x, the upstream gradient).

- *saved*: bytes of the distinct storages that autograd keeps (``saved_tensors_hooks``), parameters left out because
  they exist anyway; x is counted where it is kept, because a frozen layer would let go of it.
- *peak*: on a GPU ``torch.cuda.max_memory_allocated``; on a CPU the running sum of the allocator's events that
  ``torch.profiler`` records, which sees tensors but not scratch memory that a library allocates for itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_CPU_DEVICE_TYPE = 0


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that the graph of ``forward()`` keeps alive besides ``parameters``."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # held, so that no address is freed and given out again meanwhile
    del output
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that the allocator held at once during ``call()``, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _cpu_peak(call)


def peak_method(device: torch.device) -> str:
    """How ``peak_bytes`` measures there, in words."""
    return "cuda allocator" if device.type == "cuda" else "profiler allocator events"


def _cpu_peak(call: Callable[[], object]) -> int:
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == _CPU_DEVICE_TYPE
    ]
    held = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        highest = max(highest, held)
    return highest


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's native code announces itself on the process's stderr, over the progress bar."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
