"""The ``cuda`` backend where it cannot serve: it imports, says why, and leaves the work to others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ept_kernels import available_backends, backend_for
from ept_kernels.backends import cuda as cuda_backend
from ept_kernels.backends import cuda_library

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_not_on_a_cpu() -> None:
    assert cuda_backend.unsupported(CPU, torch.float32) == "its kernels run on CUDA devices, not on cpu"
    assert "cuda" not in available_backends(CPU)
    assert "cuda" in available_backends()


def test_forced_on_a_cpu_it_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"EPT_BACKEND='cuda' cannot serve torch\.float32 on cpu: its kernels run"):
        backend_for(CPU)


def test_not_in_float64() -> None:
    assert cuda_backend.unsupported(GPU, torch.float64) == (
        "its kernels take torch.float32, torch.float16, torch.bfloat16"
    )


def test_not_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_backend.unsupported(GPU, torch.float32) == "no NVIDIA GPU is available"


@pytest.mark.parametrize(("capability", "new_enough"), [((7, 0), False), ((7, 5), True), ((9, 0), True)])
def test_capability_comes_before_the_library(
    capability: tuple[int, int], new_enough: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = cuda_backend.unsupported(GPU, torch.bfloat16)
    assert ("compute capability 7.5" in reason) != new_enough, "a library is asked for next"
    assert ("_cuda.so has not been built" in reason) == new_enough
