"""Triton kernels in Triton's interpreter, which must be chosen before triton is imported: a pytest process of its own.

    python -m pytest tests/triton

fp32 and fp16 only: the interpreter computes bf16 wrongly. It takes milliseconds for a few operations of one program, so
shapes are small.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _reason_to_skip() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.zeros, InterpretedFunction):
        return "triton was imported without TRITON_INTERPRET=1: run tests/triton in a pytest process of its own"
    return None


@pytest.fixture(autouse=True)
def triton_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this folder runs the Triton backend, interpreted."""
    reason = _reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("EPT_BACKEND", "triton")
