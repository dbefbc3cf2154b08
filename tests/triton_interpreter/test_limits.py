"""What the Triton backend refuses or leaves to others, and why."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
from pyramid_testing import Case

import ept_kernels
import ept_kernels.triton as triton_backend
from ept_kernels import PyramidGeometry
from ept_kernels.triton import backend, configs, launch, precision

GPU = torch.device("cuda")


@pytest.mark.parametrize("version", ["3.2.0", "3.7.1+git"])
def test_an_older_triton_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.delattr(triton, "knobs")  # as before 3.4
    reason = triton_backend.unsupported(GPU, torch.bfloat16)
    assert reason is not None and f"needs Triton 3.8 or newer, found {version}" in reason


@pytest.mark.parametrize("version", ["3.8.0", "3.10.0", "4.0.0"])
def test_newer_ones_serve(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert triton_backend.unsupported(GPU, torch.bfloat16) is None


@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)])
def test_gpus_before_ampere_are_left_to_others(
    capability: tuple[int, int], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = triton_backend.unsupported(GPU, torch.float16)
    assert (reason is None) == serves
    if not serves:
        assert reason == "it needs compute capability 8.0 or newer (Ampere), cuda has 7.5"


@pytest.mark.parametrize("op", ["pyramid_delta", "pyramid_linear"])
def test_more_scales_than_bits_are_refused(op: str) -> None:
    problem = Case(PyramidGeometry(33, 33, 1, tuple(range(1, 34)))).tensors(torch.float32)
    with pytest.raises(ValueError, match="kernel_sizes holds 33 distinct scales; the triton backend takes at most 32"):
        problem.call(ept_kernels, op)


@pytest.mark.parametrize(
    ("shape", "dtype", "plan"),
    [
        ((1024, 1024), torch.bfloat16, "fused"),
        ((1024, 1000), torch.bfloat16, "split"),
        ((1000, 1024), torch.float16, "split"),
        ((1024, 1024), torch.float32, "split"),
    ],
)
def test_fused_needs_sizes_that_the_compiler_knows_to_be_aligned(
    shape: tuple[int, int], dtype: torch.dtype, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton learns of an integer argument only whether 16 divides it."""
    monkeypatch.delenv("EPT_TRITON_BASE", raising=False)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    assert backend.base_plan(weight.new_empty(4, shape[1]), weight) == plan


def test_single_is_refused_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TRITON_BASE", "single")
    weight = torch.empty(64, 64)
    assert backend.base_plan(weight, weight) == "single"
    monkeypatch.setattr(backend, "is_amd", lambda: True)
    with pytest.raises(ValueError, match="EPT_TRITON_BASE=single is for NVIDIA"):
        backend.base_plan(weight, weight)


@pytest.mark.parametrize("op", ["pyramid_weight", "pyramid_merge", "pyramid_delta", "pyramid_linear"])
def test_ops_run_on_the_device_of_their_tensors(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: what asks for the current device (tiles, precision, Triton) finds that of the rows."""
    problem, current, asked = Case(PyramidGeometry(17, 15, 2, (2, 3)), (5,)).tensors(torch.float32), [], []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor):
        current.append(tensor)
        yield
        current.pop()

    def run(kernel, *rest) -> None:
        asked.append((kernel.__name__, current[-1]))
        launch.run(kernel, *rest)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(launch, "runner", run)
    monkeypatch.setattr(configs, "family", lambda: asked.append(("family", current[-1])) or "safe")
    p = problem
    if op == "pyramid_merge":
        ept_kernels.pyramid_merge(p.weight, p.A, p.B, p.folded, p.geometry)
    else:
        p.evaluate(ept_kernels, op)
    assert len(asked) >= (1 if op == "pyramid_merge" else 3)
    assert not current


@pytest.mark.parametrize("switch", ["allow_tf32", "fp32_precision"])
def test_either_of_torchs_switches_chooses_tf32(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(precision.knobs.runtime, "interpret", False)
    monkeypatch.setattr(precision, "is_amd", lambda: False)
    try:
        assert precision.dot_precision(torch.float32) == "tf32x3"
        setattr(matmul, switch, True if switch == "allow_tf32" else "tf32")
        assert precision.dot_precision(torch.float32) == "tf32"
        assert precision.dot_precision(torch.float16) == "ieee"
    finally:
        matmul.fp32_precision = "ieee"
        matmul.allow_tf32 = False
