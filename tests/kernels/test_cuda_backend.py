"""The ``cuda`` backend where it cannot serve: it imports, says why, and leaves the work to others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ept_kernels import available_backends, backend_for, cuda_backend

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


@pytest.mark.parametrize(("capability", "served"), [((7, 0), False), ((7, 5), True), ((9, 0), True)])
def test_capability_and_library(capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda_backend, "_load", lambda library: None)
    reason = cuda_backend.unsupported(GPU, torch.bfloat16)
    assert reason is None if served else "compute capability 7.5" in reason


def test_a_library_that_is_missing_or_broken(tmp_path: Path) -> None:
    missing, broken = tmp_path / "_cuda.so", tmp_path / "broken.so"
    assert "_cuda.so has not been built" in cuda_backend._load(missing)
    broken.write_bytes(b"not a library")
    assert "broken.so does not load in torch" in cuda_backend._load(broken)
