"""One place chooses the backend: automatic, forced, refused; importing needs no GPU and no heavy library."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from pyramid_testing import Case

import ept_kernels
from ept_kernels import PyramidGeometry, available_backends, backend_for, dispatch
from ept_kernels.backends import reference as reference_backend
from ept_kernels.backends import torch as torch_backend

CPU = torch.device("cpu")
PROBLEM = Case(PyramidGeometry(6, 6, 2, (2, 3))).tensors()


def test_the_names_that_may_be_forced() -> None:
    assert {"torch", "reference"} <= set(available_backends())


@pytest.mark.parametrize("value", [None, ""])
def test_automatic_choice(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPT_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("EPT_BACKEND", value)
    assert backend_for(CPU).name in available_backends()
    assert backend_for(CPU).name != "reference", "the slow definition serves only when asked for"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_forced_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", name)
    assert backend_for(CPU).name == name


@pytest.mark.parametrize("op", ["pyramid_weight", "pyramid_delta", "pyramid_linear"])
@pytest.mark.parametrize(("name", "module"), [("torch", torch_backend), ("reference", reference_backend)])
def test_the_forced_backend_is_the_one_that_runs(op: str, name: str, module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; the choice is read at every call."""
    monkeypatch.setenv("EPT_BACKEND", name)
    called = []
    functions = ("delta_weight", "delta_weight_backward") if op == "pyramid_weight" else ("forward", "backward")
    for function in functions:
        original = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, _name=function, _f=original, **kw: (called.append(_name), _f(*a, **kw))[1]
        )
    PROBLEM.evaluate(ept_kernels, op)
    assert called == list(functions)


@pytest.mark.parametrize("op", ["pyramid_weight", "pyramid_delta", "pyramid_linear"])
def test_an_unknown_backend_fails_loudly(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"EPT_BACKEND='abacus' is no backend; allowed: .*torch.*reference"):
        PROBLEM.call(ept_kernels, op)


def test_import_touches_no_gpu_and_needs_nothing_but_torch() -> None:
    program = """
import sys
for absent in ("triton", "transformers", "peft", "ept"):
    sys.modules[absent] = None  # importing it raises ImportError
import torch
import ept_kernels
from ept_kernels import reference
assert not torch.cuda.is_initialized()
g = ept_kernels.PyramidGeometry(6, 6, 2, (2, 3))
A, B, folded, x = torch.ones(2, 3), torch.ones(3, 2), torch.ones(1, 13), torch.ones(4, 6)
torch.testing.assert_close(
    ept_kernels.pyramid_delta(x, A, B, folded, None, g), reference.pyramid_delta(x, A, B, folded, None, g)
)
ept_kernels.fold_tasks(torch.ones(2, 4), torch.ones(1, 4), 0, [torch.ones(2, 2), torch.ones(3, 3)], 1, 1.0, g)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def no_kernel_serves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "cuda"):
        refuses = SimpleNamespace(name=name, unsupported=lambda device, dtype, name=name: f"reason of {name}")
        monkeypatch.setitem(dispatch._loaded, name, refuses)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_warned", False)
    monkeypatch.delenv("EPT_BACKEND", raising=False)


@pytest.mark.usefixtures("no_kernel_serves_a_gpu")
def test_a_gpu_without_kernels_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    """Whatever the filters, and for whichever device or dtype comes first."""
    warnings.simplefilter("always")
    assert backend_for(torch.device("cuda", 0)).name == "torch"
    said = str(recwarn.pop(UserWarning).message)
    for part in ("backend 'torch'", "torch.float32 on cuda:0", "triton: reason of triton", "cuda: reason of cuda"):
        assert part in said
    assert "python -m ept_kernels" in said
    assert backend_for(torch.device("cuda", 1)).name == backend_for(torch.device("cuda", 0), torch.half).name == "torch"
    assert not recwarn.list


@pytest.mark.usefixtures("no_kernel_serves_a_gpu")
def test_nobody_is_told_of_a_forced_backend_or_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    backend_for(CPU)
    backend_for(CPU, torch.float16)
    monkeypatch.setenv("EPT_BACKEND", "torch")
    backend_for(torch.device("cuda", 0))
    assert not recwarn.list


def test_nobody_is_told_where_a_kernel_serves(
    no_kernel_serves_a_gpu: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    serves = SimpleNamespace(name="cuda", unsupported=lambda device, dtype: None)
    monkeypatch.setitem(dispatch._loaded, "cuda", serves)
    assert backend_for(torch.device("cuda", 0)) is serves
    assert not recwarn.list
