"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
from pyramid_testing import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces each backend that serves a CPU in turn."""
    monkeypatch.setenv("EPT_BACKEND", request.param)
    return request.param


@pytest.fixture
def torch_backend_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "torch")
