"""The Triton kernels on a GPU against ``reference.py`` in float64: the accuracy rule on real layers, determinism."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpu_testing import DTYPES, PAPER, PLANS, like_a_layer, on_gpu
from pyramid_testing import (
    Case,
    assert_all_match,
    assert_same_bits,
    expected_where_active,
    partly_active,
    poisoned_memory,
    relative_error,
)

import ept_kernels
from ept_kernels import PyramidGeometry, reference

#: Layers of T5-base (q, wi, wo) and of LLaMA2-7B (q, up, down).
LAYERS = {
    "t5-base q": PyramidGeometry(768, 768, 8, PAPER),
    "t5-base wi": PyramidGeometry(768, 3072, 8, PAPER),
    "t5-base wo": PyramidGeometry(3072, 768, 8, PAPER),
    "llama2-7b q": PyramidGeometry(4096, 4096, 8, PAPER),
    "llama2-7b up": PyramidGeometry(4096, 11008, 8, PAPER),
    "llama2-7b down": PyramidGeometry(11008, 4096, 8, PAPER),
}
SMALL = {
    "ungrouped": Case(PyramidGeometry(70, 34, 3, (2, 3, 4)), (67,)),
    "by sample": Case(PyramidGeometry(50, 96, 17, (2, 8)), (5, 31), "sample", 3, layout="sliced"),
    "by row": Case(PyramidGeometry(37, 41, 3, tuple(range(1, 17))), (65,), "row", 4, skew="zipf"),
    "scale 1 alone": Case(PyramidGeometry(70, 45, 8, (1,)), (67,)),
    "no rows": Case(PyramidGeometry(16, 16, 2, (2,)), (0,)),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_small_layers_in_fp32(case: Case, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edge at once, from poisoned memory; what ``make memcheck`` runs."""
    monkeypatch.setenv("EPT_TRITON_BASE", plan)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    problem = on_gpu(case.tensors(torch.float32))
    truth = problem.evaluate(reference, "pyramid_linear", dtype=torch.float64)
    with poisoned_memory():
        assert_all_match(problem.evaluate(ept_kernels, "pyramid_linear"), truth, 1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_small_layers_with_inactive_scales(case: Case, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What inactive scales leave unwritten is never read."""
    monkeypatch.setenv("EPT_TRITON_BASE", plan)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    problem = on_gpu(partly_active(case, torch.float32))
    truth = expected_where_active(problem, "pyramid_linear")
    with poisoned_memory():
        assert_all_match(problem.evaluate(ept_kernels, "pyramid_linear"), truth, 1e-5)


def linear_by_sample(x, weight, bias, A, B, folded, groups, geometry):
    """``reference.pyramid_linear`` sample by sample; that one gathers a dense weight for every row."""
    dense = reference.pyramid_weight(A, B, folded, geometry).to(x.dtype)
    delta = [rows @ dense[group].T for rows, group in zip(x, groups.tolist(), strict=True)]
    return torch.nn.functional.linear(x, weight, bias) + torch.stack(delta)


by_sample = SimpleNamespace(pyramid_linear=linear_by_sample)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_error_at_most_twice_that_of_plain_torch(
    layer: PyramidGeometry, dtype: torch.dtype, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 A, B and kernels beside rows of any dtype; plain torch multiplies by the dense weight in the rows' dtype."""
    monkeypatch.setenv("EPT_TRITON_BASE", plan)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    case = Case(layer, (4, 150), "sample", 2, bias=False)
    problem = like_a_layer(on_gpu(case.tensors(dtype, adapter_dtype=torch.float32)))
    wanted = ["x", "A", "B", "folded"]
    truth = problem.evaluate(by_sample, "pyramid_linear", torch.float64, wanted)
    plain = problem.evaluate(by_sample, "pyramid_linear", wanted=wanted)
    for name, value in problem.evaluate(ept_kernels, "pyramid_linear", wanted=wanted).items():
        error, allowed = relative_error(value, truth[name]), 2 * relative_error(plain[name], truth[name])
        assert error <= max(allowed, 1e-5 if dtype == torch.float32 else 0), f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_determinism(dtype: torch.dtype, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TRITON_BASE", plan)
    case = Case(PyramidGeometry(768, 512, 8, PAPER), (8, 173), "sample", 3)
    problem = like_a_layer(on_gpu(case.tensors(dtype, adapter_dtype=torch.float32)))
    names = ["x", "A", "B", "folded"]
    first = problem.evaluate(ept_kernels, "pyramid_linear", wanted=names)
    for _ in range(5):
        for name, value in problem.evaluate(ept_kernels, "pyramid_linear", wanted=names).items():
            assert_same_bits(value.cpu(), first[name].cpu(), name)
