"""Every plan and backend on a GPU against ``reference.py`` in float64: accuracy on real layers, determinism."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_testing import DTYPES, PAPER, PLANS, force, like_a_layer, on_gpu
from pyramid_testing import (
    Case,
    assert_all_match,
    assert_matches,
    assert_same_bits,
    assert_twice_as_wrong_at_most,
    expected_where_active,
    partly_active,
    poisoned_memory,
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
    "transposed rows": Case(PyramidGeometry(37, 41, 3, (2, 5)), (3, 20), "sample", 2, layout="transposed"),
    "scale 1 alone": Case(PyramidGeometry(70, 45, 8, (1,)), (67,)),
    "no rows": Case(PyramidGeometry(16, 16, 2, (2,)), (0,)),
}
NAMES = ["x", "A", "B", "folded"]
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("op", ["pyramid_weight", "pyramid_delta", "pyramid_linear"])
@pytest.mark.parametrize("plan", [plan for plan in PLANS if "fused" not in plan])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_small_layers_in_fp32(case: Case, plan: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edge at once, from poisoned memory; what ``make memcheck`` runs."""
    force(plan, monkeypatch)
    problem = on_gpu(case.tensors(torch.float32))
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    with poisoned_memory():
        assert_all_match(problem.evaluate(ept_kernels, op), truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_small_layers_with_inactive_scales(
    case: Case, plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What inactive scales leave unwritten is never read."""
    force(plan, monkeypatch, dtype)
    problem = on_gpu(partly_active(case, dtype, adapter_dtype=torch.float32))
    truth = expected_where_active(problem, "pyramid_linear")
    with poisoned_memory():
        results = problem.evaluate(ept_kernels, "pyramid_linear")
    assert_all_match(results, truth, 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)


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
    force(plan, monkeypatch, dtype)
    case = Case(layer, (4, 150), "sample", 2, bias=False)
    problem = like_a_layer(on_gpu(case.tensors(dtype, adapter_dtype=torch.float32)))
    results = problem.evaluate(ept_kernels, "pyramid_linear", wanted=NAMES)
    floor = 1e-5 if dtype == torch.float32 else 0.0
    assert_twice_as_wrong_at_most(results, problem, by_sample, "pyramid_linear", floor)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_determinism(dtype: torch.dtype, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what is computed again in the backward."""
    force(plan, monkeypatch, dtype)
    case = Case(PyramidGeometry(768, 512, 8, PAPER), (8, 173), "sample", 3)
    problem = like_a_layer(on_gpu(case.tensors(dtype, adapter_dtype=torch.float32)))
    first = problem.evaluate(ept_kernels, "pyramid_linear", wanted=NAMES)
    for recompute in ("", "", "1"):
        monkeypatch.setenv("EPT_RECOMPUTE", recompute)
        for name, value in problem.evaluate(ept_kernels, "pyramid_linear", wanted=NAMES).items():
            assert_same_bits(value.cpu(), first[name].cpu(), name)


@pytest.mark.parametrize("plan", PLANS)
def test_merge(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(plan, monkeypatch)
    problem = like_a_layer(on_gpu(Case(LAYERS["t5-base q"]).tensors(torch.float32)))
    p = replace(problem, weight=problem.weight.bfloat16())
    update = reference.pyramid_weight(p.A.double(), p.B.double(), p.folded.double(), p.geometry)
    merged = ept_kernels.pyramid_merge(p.weight, p.A, p.B, p.folded, p.geometry)
    assert merged.dtype == torch.bfloat16
    assert_matches(merged, p.weight.double() + update, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("plan", PLANS)
def test_dropout(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is linear in x: ``<dx, x> = <dy, y>`` if backward drops what forward dropped. Equal seeds, equal bits."""
    force(plan, monkeypatch)
    problem = like_a_layer(on_gpu(Case(LAYERS["t5-base q"], (4, 100), "sample", 2).tensors(torch.float32)))
    adapter = (problem.A, problem.B, problem.folded, problem.groups, problem.geometry)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        x = problem.x.clone().requires_grad_()
        outputs.append(ept_kernels.pyramid_delta(x, *adapter, dropout_p=0.3))
        (gradient,) = torch.autograd.grad(outputs[-1], x, problem.cotangent)
        inside, outside = (x * gradient).double().sum(), (outputs[-1] * problem.cotangent).double().sum()
        assert abs(inside - outside) < 1e-4 * outputs[-1].norm() * problem.cotangent.norm()
    assert_same_bits(outputs[0].cpu(), outputs[1].cpu())
    other = ept_kernels.pyramid_delta(problem.x, *adapter, dropout_p=0.3)
    assert (other - outputs[0]).norm() > 0.1 * other.norm()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_groups_that_do_not_exist(plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows become NaN, and the context stays usable: the next call is right."""
    force(plan, monkeypatch, dtype)
    problem = on_gpu(Case(PyramidGeometry(70, 34, 3, (2, 3, 9)), (50,), "row", 3).tensors(dtype))
    groups = problem.groups.clone()
    groups[[1, -1]] = groups.new_tensor([3, -1])
    results = replace(problem, groups=groups).evaluate(ept_kernels, "pyramid_delta")
    for name in ("output", "x"):
        assert results[name].isnan().all(1).nonzero().flatten().tolist() == [1, 49], name
        assert results[name].isnan().any(1).sum() == 2, name
    assert not results["folded"].isnan().any() or plan == "torch"
    truth = problem.evaluate(reference, "pyramid_delta", dtype=torch.float64)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert_all_match(problem.evaluate(ept_kernels, "pyramid_delta"), truth, tolerance)


@pytest.mark.parametrize("plan", PLANS)
def test_more_elements_than_32_bits_count(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of 2^31 elements of x, y and U are those of a small call."""
    force(plan, monkeypatch, torch.bfloat16)
    rows, geometry = 2**20 + 128, PyramidGeometry(2176, 2176, 54, (2, 4, 6, 8, 10, 12))
    needed = 14 * 2 * rows * geometry.in_features
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"it takes {needed >> 30} GiB of GPU memory")
    last = like_a_layer(on_gpu(Case(geometry, (128,), "row", 3).tensors(torch.bfloat16)))
    x = torch.zeros(rows, geometry.in_features, dtype=torch.bfloat16, device="cuda")
    groups = torch.zeros(rows, dtype=torch.int64, device="cuda")
    x[-128:], groups[-128:] = last.x, last.groups
    arguments = (last.weight, last.bias, last.A, last.B, last.folded)
    with torch.no_grad():
        output = ept_kernels.pyramid_linear(x, *arguments, groups, geometry)
        expected = ept_kernels.pyramid_linear(last.x, *arguments, last.groups, geometry)
    assert_matches(output[-128:], expected, torch.finfo(torch.bfloat16).eps)
    assert_matches(output[:1], last.bias[None], torch.finfo(torch.bfloat16).eps)
