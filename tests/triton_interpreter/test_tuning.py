"""Which configuration runs where kernels are tuned: one measurement for whatever may change the fastest one."""

from __future__ import annotations

import importlib

import pytest
import torch
import triton
from pyramid_testing import Case

import ept_kernels
from ept_kernels import PyramidGeometry
from ept_kernels.triton import tune

GEOMETRY = PyramidGeometry(64, 48, 2, (2, 4))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Tuning on, nothing timed: the keys that were asked for. Small batches have one candidate; here it comes twice."""
    known: dict = {}
    monkeypatch.setattr(tune, "_measured", known)
    monkeypatch.setattr(tune, "_tunes", lambda device: True)
    monkeypatch.setattr(triton.testing, "do_bench", lambda trial: 1.0)
    for name in ("shrink", "expand", "factor_grad"):
        module = importlib.import_module(f"ept_kernels.triton.{name}")
        candidates = getattr(module, f"{name}_candidates")
        monkeypatch.setattr(module, f"{name}_candidates", lambda *sizes, _of=candidates: _of(*sizes)[:1] * 2)
    return known


def keys(measured: dict, kernel: str) -> int:
    return sum(key[0] == kernel for _, key in measured)


def test_batches_of_similar_size_share_a_measurement(measured: dict) -> None:
    for rows in (40, 50, 64):
        Case(GEOMETRY, (rows,)).tensors(torch.float32).call(ept_kernels, "pyramid_delta")
    assert (keys(measured, "shrink"), keys(measured, "expand")) == (1, 1)
    Case(GEOMETRY, (65,)).tensors(torch.float32).call(ept_kernels, "pyramid_delta")
    assert (keys(measured, "shrink"), keys(measured, "expand")) == (2, 2)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_rows_of_another_layout_are_measured_anew(layout: str, measured: dict) -> None:
    for each in ("contiguous", layout, layout):
        problem = Case(GEOMETRY, (50,), layout=each).tensors(torch.float32)
        problem.evaluate(ept_kernels, "pyramid_delta")
    assert keys(measured, "shrink") == 6, "x forward, x backward, dy; each in two layouts"
    assert keys(measured, "factor_grad") == 2
    assert keys(measured, "expand") == 2, "its rows are always ours: y and dx"


def test_dropout_is_measured_apart(measured: dict) -> None:
    problem = Case(GEOMETRY, (50,)).tensors(torch.float32)
    x = problem.x.requires_grad_()
    for p in (0.0, 0.1, 0.3):
        arguments = (problem.A, problem.B, problem.folded, None, GEOMETRY)
        ept_kernels.pyramid_delta(x, *arguments, dropout_p=p).sum().backward()
    assert keys(measured, "shrink") == 3, "x with and without, dy without"
    assert keys(measured, "expand") == 3, "y without, dx with and without"


def test_scales_that_are_told_are_measured_apart(measured: dict) -> None:
    problem = Case(GEOMETRY, (50,)).tensors(torch.float32)
    arguments = (problem.x, problem.A, problem.B, problem.folded, None, GEOMETRY)
    for active in (None, torch.ones(1, 2, dtype=torch.bool)):
        ept_kernels.pyramid_delta(*arguments, active=active)
    assert keys(measured, "shrink") == 2
