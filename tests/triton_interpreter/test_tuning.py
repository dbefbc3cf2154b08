"""Which configuration of the fused product runs: one measurement for whatever may change the fastest one."""

from __future__ import annotations

import pytest
import torch
import triton

from ept_kernels.triton import fused, launch, tune


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Tuning on, nothing timed or launched: the configurations by the keys that were asked for."""
    known: dict = {}
    monkeypatch.setattr(tune, "_measured", known)
    monkeypatch.setattr(tune, "_tunes", lambda device: True)
    monkeypatch.setattr(triton.testing, "do_bench", lambda trial: 1.0)
    monkeypatch.setattr(launch, "runner", lambda *_: None)
    return known


def call(rows: int, inner: int = 16, x: torch.Tensor | None = None, weight: torch.Tensor | None = None) -> None:
    x = torch.randn(rows, inner).half() if x is None else x
    weight = torch.randn(8, inner).half() if weight is None else weight
    fused.fused(x, weight, None, torch.randn(rows, 4).half(), torch.randn(4, 8).half())


def test_batches_of_similar_size_share_a_measurement(measured: dict) -> None:
    for rows in (65, 100, 128):
        call(rows)
    assert len(measured) == 1
    call(129)
    call(100, inner=32)
    assert len(measured) == 3


def test_other_layouts_are_measured_anew(measured: dict) -> None:
    call(50)
    call(50, x=torch.randn(50, 19).half()[:, 2:18])
    call(50, weight=torch.randn(16, 8).half().T)
    assert len(measured) == 3
    call(50, x=torch.randn(16, 50).half().T)  # is copied first
    assert len(measured) == 3


def test_the_fastest_is_kept(measured: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 1.0])
    monkeypatch.setattr(triton.testing, "do_bench", lambda trial: next(times))
    started = []
    monkeypatch.setattr(launch, "runner", lambda *arguments: started.append(arguments[-1]))
    for _ in range(2):
        call(100)
    candidates = fused.candidates(100)
    assert started == [candidates[1]] * 2


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_measured_where_it_may_not_be(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being asked, on a CPU, where results must not depend on a measurement, or in a graph."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("EPT_TRITON_AUTOTUNE", "1" if asked else "")
    gpu = torch.device("cuda")
    assert tune._tunes(gpu) == asked
    assert not tune._tunes(torch.device("cpu"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not tune._tunes(gpu)
    monkeypatch.undo()
    monkeypatch.setenv("EPT_TRITON_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tune._tunes(gpu)
