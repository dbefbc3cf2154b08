"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pyramid_testing import BACKENDS

from ept_kernels.backends import cpu as cpu_backend


@pytest.fixture
def force_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Forces a backend; skips where this machine lacks it, and says why."""

    def force(name: str) -> None:
        if name == "cpu" and (reason := cpu_backend.unsupported(torch.device("cpu"), torch.float32)):
            pytest.skip(f"no native CPU backend: {reason}")
        monkeypatch.setenv("EPT_BACKEND", name)

    return force


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, force_backend: Callable[[str], None]) -> str:
    """Forces each backend that serves a CPU in turn."""
    force_backend(request.param)
    return request.param


@pytest.fixture
def torch_backend_forced(force_backend: Callable[[str], None]) -> None:
    force_backend("torch")
