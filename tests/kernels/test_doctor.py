"""``python -m ept_kernels``: what a user pastes into a bug report, and that a wrong backend fails it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ept_kernels import dispatch, doctor
from ept_kernels.backends import torch as torch_backend
from ept_kernels.problem import Output

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_command() -> None:
    """Everything named, nothing coloured, lines that fit a terminal; and no GPU is touched."""
    found = subprocess.run([sys.executable, "-m", "ept_kernels"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    for part in (torch.__version__, "numpy", "peft", "processor", "driver", "cpu float16", "cpu_selected", "all right"):
        assert part in found.stdout
    assert "\x1b" not in found.stdout
    assert max(len(line) for line in found.stdout.splitlines() if "/" not in line) < 80


def test_every_backend_that_serves_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "abacus")  # whatever is forced, all are checked
    results = list(doctor.checks())
    assert all(right for right, _ in results), results
    for dtype in doctor.CHECKED:
        for name in dispatch.available_backends(CPU, doctor.DTYPES[dtype]):
            assert name == "reference" or any(line.split()[1:3] == [dtype, name] for _, line in results)


@pytest.mark.parametrize("dtype", doctor.CHECKED)
def test_a_wrong_backend_fails(dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = torch_backend.backward

    def scaled(*args: object, **options: object) -> tuple[torch.Tensor, ...]:
        return tuple(1.05 * part for part in right(*args, **options))

    monkeypatch.setattr(torch_backend, "backward", scaled)
    ok, words = doctor.check("torch", CPU, doctor.DTYPES[dtype])
    assert not ok
    assert "grad A" in words and "output" not in words
    monkeypatch.setattr(dispatch, "available_backends", lambda: ("torch",))
    assert doctor.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_nan_and_exceptions_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda *args: Output(right(*args).y * torch.nan))
    assert not doctor.check("torch", CPU, torch.float32)[0]

    def crash(*args: object, **options: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch_backend, "forward", crash)
    assert doctor.check("torch", CPU, torch.float32) == (False, "RuntimeError: no such instruction")


@pytest.mark.parametrize("served", [True, False])
def test_what_would_serve_a_gpu(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    class Backend:
        forward = None

        @staticmethod
        def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
            return None if served and device.type == "cuda" else "too old"

        @staticmethod
        def build_info() -> dict[str, str]:
            if not served:
                raise RuntimeError("has not been built")
            return {"compiler": "nvcc 13.0"}

    for name in ("triton", "cuda"):
        monkeypatch.setitem(dispatch._loaded, name, Backend)
    assert doctor.would_serve_a_gpu("triton") == (None if served else "too old")
    assert doctor.would_serve_a_gpu("cuda") == (None if served else "has not been built")
    assert doctor._build("cuda") == ("compiler nvcc 13.0" if served else "has not been built")
    assert sum("would serve" in line for line in doctor.backends()) == (2 if served else 0)
