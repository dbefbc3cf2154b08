"""Which backend routes tasks and folds kernels in one step, and where that is left to plain operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pyramid_testing import Recorder
from torch import Tensor
from torch.autograd import forward_ad

from ept_kernels import PyramidGeometry, fold_tasks
from ept_kernels.backends import cpu as cpu_backend

GEOMETRY = PyramidGeometry(16, 16, 2, (2, 4))


def folds(gate: Tensor, table: Tensor | None = None) -> bool:
    kernels = [torch.ones(k, k, dtype=gate.dtype, device=gate.device) for k in GEOMETRY.kernel_sizes]
    return fold_tasks(gate, gate if table is None else table, None, kernels, 1, 1.0, GEOMETRY) is not None


@pytest.mark.parametrize("name", [None, "cpu"])
def test_the_native_backend_takes_plain_fp32_on_a_cpu(
    name: str | None, force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force_backend("cpu")
    if name is None:
        monkeypatch.delenv("EPT_BACKEND")
    plain = torch.ones(2, 4)
    assert folds(plain)
    assert folds(torch.nn.Parameter(plain))
    assert not folds(plain.T.contiguous().T)
    assert not folds(plain, plain.double())
    assert not folds(plain, plain.to("meta"))
    with Recorder():
        assert not folds(plain)
    with forward_ad.dual_level():
        assert not folds(plain)


@pytest.mark.parametrize("like", [torch.ones(2, 4).double(), torch.ones(2, 4).bfloat16(), torch.ones(2, 4).to("meta")])
def test_other_parameters_are_left_to_plain_operations(like: Tensor) -> None:
    assert not folds(like)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_forced_backend_without_a_fold_has_none(name: str, force_backend: Callable[[str], None]) -> None:
    force_backend(name)
    assert not folds(torch.ones(2, 4))


def test_an_unknown_backend_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "abacus")
    with pytest.raises(ValueError, match="EPT_BACKEND='abacus' is no backend"):
        folds(torch.ones(2, 4))


def test_compiled_code_holds_plain_operations(force_backend: Callable[[str], None]) -> None:
    """A compiler must see them: nothing of the native call is in its graph."""
    force_backend("cpu")
    assert cpu_backend.unsupported(torch.device("cpu"), torch.float32) is None
    answers = []

    def step(gate: Tensor) -> Tensor:
        answers.append(folds(gate))
        return gate + 1

    torch._dynamo.reset()
    torch.compile(step, backend="eager", fullgraph=True)(torch.ones(2, 4))
    assert answers == [False]


def test_shapes_that_native_code_would_run_over_are_refused() -> None:
    gate, table, kernels = torch.ones(2, 5), torch.ones(3, 5), [torch.ones(2, 2), torch.ones(4, 4)]

    def call(gate=gate, table=table, kernels=kernels, top_k=1) -> None:
        fold_tasks(gate, table, 0, kernels, top_k, 1.0, GEOMETRY)

    call()
    with pytest.raises(ValueError, match=r"gate must be \[2 experts, d\], got \[3, 5\]"):
        call(gate=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"table must be \[tasks, d=5\], got \[3, 4\]"):
        call(table=torch.ones(3, 4))
    with pytest.raises(ValueError, match="top_k must be from 1 to 2, got 3"):
        call(top_k=3)
    with pytest.raises(ValueError, match=r"kernels must be \[k, k\] with k in \(2, 4\), got \[\[4, 4\], \[2, 2\]\]"):
        call(kernels=kernels[::-1])
