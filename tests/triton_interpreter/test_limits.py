"""What the Triton backend refuses or leaves to others, and which device its kernels start on."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
from pyramid_testing import Case

import ept_kernels
import ept_kernels.triton as triton_backend
from ept_kernels import PyramidGeometry
from ept_kernels.problem import Base
from ept_kernels.triton import backend, fused, launch
from ept_kernels.triton.core import core

GPU = torch.device("cuda")


@pytest.mark.parametrize("version", ["3.2.0", "3.3.1+git"])
def test_an_older_triton_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.delattr(triton, "knobs")  # as before 3.4
    reason = triton_backend.unsupported(GPU, torch.bfloat16)
    assert reason is not None and f"needs Triton 3.4 or newer, found {version}" in reason


@pytest.mark.parametrize("version", ["3.4.0", "3.8.0", "3.10.0", "4.0.0"])
def test_newer_ones_serve(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert triton_backend.unsupported(GPU, torch.bfloat16) is None


@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_before_ampere_are_left_to_others(
    capability: tuple[int, int], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = triton_backend.unsupported(GPU, torch.float16)
    assert (reason is None) == serves
    if not serves:
        assert reason == "it needs compute capability 8.0 or newer (Ampere), cuda has 7.5"


def test_float64_is_left_to_others() -> None:
    assert "it computes in torch.float32" in triton_backend.unsupported(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("op", ["pyramid_delta", "pyramid_linear"])
def test_more_scales_than_any_layer_has(op: str) -> None:
    """No number of scales is too large: each is a program."""
    problem = Case(PyramidGeometry(33, 33, 1, tuple(range(1, 34))), (2,)).tensors(torch.float32)
    grids = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "runner", lambda kernel, grid, *_: grids.append((kernel.__name__, grid)))
        problem.call(ept_kernels, op)
    assert ("core_kernel", (1, 33, 1)) in grids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plan_fused_is_for_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_GPU_PLAN", "fused")
    launched = []
    monkeypatch.setattr(launch, "runner", lambda kernel, *_: launched.append(kernel.__name__))
    p = Case(PyramidGeometry(17, 15, 2, (2, 3)), (5,)).tensors(dtype)
    backend.forward(p.for_backends(), Base(p.weight, p.bias))
    assert ("fused_kernel" in launched) == (dtype == torch.float16)


def test_a_plan_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_GPU_PLAN", "single")
    p = Case(PyramidGeometry(17, 15, 2, (2, 3)), (5,)).tensors(torch.float32)
    with pytest.raises(ValueError, match="EPT_GPU_PLAN must be one of library, fused, or unset, got 'single'"):
        backend.forward(p.for_backends(), Base(p.weight, p.bias))


# --- which device -----------------------------------------------------------------------------------------------------


class OnDevice1(torch.Tensor):
    """A tensor that says that it is on the second GPU."""

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize(("current", "entered"), [(1, []), (0, [1])])
def test_kernels_start_on_the_device_of_their_tensors(
    current: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, started = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda index: changes.append(index) or contextlib.nullcontext())
    monkeypatch.setattr(launch, "runner", lambda kernel, *_: started.append((kernel.__name__, list(changes))))
    core(torch.randn(4, 10).as_subclass(OnDevice1), torch.randn(1, 13), None, None, (2, 3))
    assert started == [("core_kernel", entered)]


def test_tiles_are_chosen_on_the_device_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    current, asked = [], []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(fused, "family", lambda: asked.append(current[-1]) or "safe")
    monkeypatch.setattr(launch, "runner", lambda *_: asked.append(current[-1]))
    x = torch.randn(70, 8).half()
    fused.fused(x, torch.randn(6, 8).half(), None, torch.randn(70, 4).half(), torch.randn(4, 6).half())
    assert len(asked) >= 2
    assert all(tensor is x for tensor in asked)
