"""What the GPU tests share: problems on a GPU, at the size of a trained layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType

import pytest
import torch
from pyramid_testing import Problem

from ept_kernels import available_backends

#: Backends of a GPU, and how they add the update; ``EPT_BACKEND`` and ``EPT_GPU_PLAN`` force one.
PLANS = {
    "triton library": ("triton", "library"),
    "triton fused": ("triton", "fused"),
    "cuda": ("cuda", ""),
    "torch": ("torch", ""),
}
#: Modules of small kernels.
KERNELS = {"triton": "triton.backend", "cuda": "backends.cuda", "torch": "backends.torch"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAPER = (2, 2, 4, 4, 6, 6, 8, 8)


def force(plan: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> None:
    """Let one of ``PLANS`` compute; skips where it cannot serve, and says why."""
    backend, of_update = PLANS[plan]
    skip_unless_served(backend, dtype)
    if of_update == "fused" and dtype == torch.float32:
        pytest.skip("plan fused is for half precision: fp32 runs as library")
    monkeypatch.setenv("EPT_BACKEND", backend)
    monkeypatch.setenv("EPT_GPU_PLAN", of_update)


def skip_unless_served(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if backend not in available_backends(torch.device("cuda"), dtype):
        pytest.skip(f"backend {backend} does not serve {dtype} here: python -m ept_kernels says why")


def small_kernels(backend: str) -> ModuleType:
    """The module of a backend's small kernels; skips where it cannot serve."""
    skip_unless_served(backend)
    return importlib.import_module(f"ept_kernels.{KERNELS[backend]}")


def on_gpu(problem: Problem) -> Problem:
    tensors = {field.name: getattr(problem, field.name) for field in fields(problem)}
    moved = {name: value.cuda() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return replace(problem, **moved)


def like_a_layer(problem: Problem) -> Problem:
    """Weights of a trained layer's size rather than of 1, so that outputs stay near 1 and fp16 does not overflow."""
    g = problem.geometry
    factors = {"weight": g.in_features**-0.5, "A": g.seed_width**-0.5, "B": g.rank**-0.5}
    return replace(problem, **{name: getattr(problem, name) * factor for name, factor in factors.items()})


def launched(step: Callable[[], object]) -> list[str]:
    """The kernels that ``step`` starts, as the profiler sees them on the device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith(("Memset", "Memcpy"))]


def capture(step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """``step`` in a CUDA graph, after three runs that compile and allocate; the graph and what it writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured
