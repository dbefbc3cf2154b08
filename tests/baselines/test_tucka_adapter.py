"""``TuckerAdapter`` and ``CentroidRouter`` against the definition: outputs and every gradient, on each CPU backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import tucka_reference as reference
from hypothesis import given
from pyramid_testing import (
    HOST_READS,
    SINGLE_PRECISION,
    Case,
    Recorder,
    assert_all_match,
    assert_matches,
    assert_same_bits,
    examples,
    from_seed,
    poisoned_memory,
    relative_error,
)
from tucka_testing import TuckAProblem, random_problem, tucker_adapter

from ept.baselines.tucka.adapter import TuckAConfig
from ept.baselines.tucka.router import Route, fixed_route
from ept_kernels import PyramidGeometry
from ept_kernels.backends import cpu as cpu_backend

BACKENDS = ("torch", "reference", "cpu")
TYPICAL = TuckAProblem(Case(PyramidGeometry(48, 40, 8, (1,)), (4, 16)), masked=True)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and (reason := cpu_backend.unsupported(torch.device("cpu"), torch.float32)):
        pytest.skip(f"no native CPU backend: {reason}")
    monkeypatch.setenv("EPT_BACKEND", request.param)
    return request.param


def assert_exact(problem: TuckAProblem, dtype: torch.dtype, *, whole: bool = True) -> None:
    """1e-5 in fp32, or twice the definition's own error there: norms take the largest part out of some gradients."""
    truth = problem.reference(dtype)
    with poisoned_memory():
        results = problem.ours(dtype, whole=whole)
    assert {result.dtype for result in results.values()} == {dtype}
    if dtype == torch.float64:
        assert_all_match(results, truth, 1e-10)
        return
    plain = problem.reference(dtype, compute=dtype)
    for name, value in results.items():
        assert_matches(value, truth[name], max(1e-5, 2 * relative_error(plain[name], truth[name])), name)


@pytest.mark.parametrize("whole", [True, False], ids=["linear", "update"])
@given(problem=from_seed(random_problem))
@examples(25)
def test_equals_the_definition(backend: str, whole: bool, problem: TuckAProblem) -> None:
    assert_exact(problem, torch.float32 if backend in SINGLE_PRECISION else torch.float64, whole=whole)


@pytest.mark.parametrize("rank", [2, 16, 17, 48])
def test_ranks(backend: str, rank: int) -> None:
    problem = replace(TYPICAL, case=Case(PyramidGeometry(51, 37, rank, (1,)), (2, 9)))
    assert_exact(problem, torch.float32)


def test_no_rows(backend: str) -> None:
    """A batch without tokens has no mean: it routes somewhere and returns nothing."""
    problem = replace(TYPICAL, case=replace(TYPICAL.case, lead=(0, 5)), masked=False)
    results = problem.ours(torch.float32)
    assert results["output"].shape == (0, 5, 40)
    assert not any(results[name].any() for name in ("G", "U", "C", "centroids"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("seed", range(3))
def test_half_error_at_most_twice_that_of_plain_torch(monkeypatch, dtype: torch.dtype, seed: int) -> None:
    """fp32 factors beside half rows; plain torch computes the definition in the rows' dtype."""
    problem = replace(TYPICAL, case=replace(TYPICAL.case, seed=seed))
    truth = problem.reference(dtype, torch.float32)
    plain = problem.reference(dtype, torch.float32, compute=dtype)
    for backend in ("torch", "cpu"):
        if backend == "cpu" and cpu_backend.unsupported(torch.device("cpu"), dtype) is not None:
            continue  # it has no fp16
        monkeypatch.setenv("EPT_BACKEND", backend)
        results = problem.ours(dtype, torch.float32)
        for name, value in results.items():
            assert value.dtype == (dtype if name in ("output", "x") else torch.float32), name
            allowed = 2 * relative_error(plain[name], truth[name])
            assert relative_error(value, truth[name]) <= allowed, f"{backend}, {name}"


def test_a_small_update_survives_bfloat16() -> None:
    """Of an update of 3e-4 of the input, added to a bfloat16 input, a fifth is left; through the weight all of it."""
    torch.manual_seed(0)
    adapter = tucker_adapter(256, 256, TuckAConfig(num_groups=1))
    adapter.shared.fix(0, [0.5, 0.5])
    x, weight = torch.randn(256, 256).bfloat16(), (torch.randn(256, 256) / 16).bfloat16()
    route = adapter.shared.fixed
    with torch.no_grad():
        size = float(adapter.update(x.float(), route).norm() / x.float().norm())
        adapter.alpha *= 3e-4 / size
        wanted = x.double() @ adapter.weight_update(weight, route).double().T
        base = torch.nn.functional.linear(x, weight).double()
        achieved = adapter.linear(x, weight, None).double() - base
        inside = torch.nn.functional.linear(x + adapter.update(x, route), weight).double() - base
    share = [float((change * wanted).sum() / wanted.square().sum()) for change in (achieved, inside)]
    assert 0.8 < share[0] < 1.2
    assert share[1] < 0.5


def test_a_fixed_route_folds_into_the_weight() -> None:
    """``W' = W (I + alpha U M U^T)^T``, spelled out, and ``x W'^T`` is what the layer computes."""
    torch.manual_seed(0)
    adapter = tucker_adapter(20, 30, TuckAConfig(r=4, group_size=3, lora_alpha=3.0), torch.float64)
    weight, x = torch.randn(30, 20, dtype=torch.float64), torch.randn(2, 5, 20, dtype=torch.float64)
    weights = torch.rand(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="fix one route first"):
        adapter.merge_into(weight, 0)
    adapter.shared.fix(1, weights)
    route = adapter.shared.fixed
    with torch.no_grad():
        merged = weight + adapter.weight_update(weight, route)
        T = reference.transform(adapter.G, adapter.U, adapter.C, 1, weights)
        assert_matches(merged, weight @ (torch.eye(20, dtype=torch.float64) + 3.0 * T).T, 1e-12)
        assert_same_bits(adapter.merge_into(weight, 0), merged)
        assert_matches(x @ merged.T, adapter.linear(x, weight, None), 1e-12)
        other = adapter.weight_update(weight, fixed_route(0, weights, 2, 3))
    assert relative_error(merged - weight, other) == pytest.approx(0, abs=1e-12)  # equal slices: groups agree at first


@pytest.mark.parametrize("core_rank", [2, 3])
def test_initial_state(core_rank: int) -> None:
    """All slices alike; not a no-op as published, one if centred, and then C and G learn at once, U after them."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 32, dtype=torch.float64), torch.randn(16, 32, dtype=torch.float64)
    base = torch.nn.functional.linear(x, weight)
    for init in ("kaiming", "centred"):
        adapter = tucker_adapter(32, 16, TuckAConfig(r=4, core_rank=core_rank, init=init), torch.float64)
        adapter.shared.fix(1, [0.6, 0.5])
        assert torch.equal(adapter.G, adapter.G[0, 0].expand_as(adapter.G))
        y = adapter.linear(x, weight, None)
        y.square().sum().backward()
        if init == "centred":
            assert_matches(y, base, 1e-15 if core_rank == 3 else 0.0)
            assert adapter.C.grad.norm() > 1e-3
            assert adapter.G.grad[1].norm() > 1e-3
            assert adapter.U.grad.norm() < 1e-12
        else:
            assert 1e-4 < relative_error(y, base) < 0.2
            assert all(p.grad.norm() > 1e-3 for p in (adapter.C, adapter.G, adapter.U))
        assert not adapter.G.grad[0].any()  # the group that the route passed by


def test_scale_of_the_factors_does_not_matter() -> None:
    problem = TYPICAL
    results = problem.ours(torch.float64)
    tensors = problem.tensors
    scaled = {"G": 3.0, "U": 0.1, "C": 20.0}

    class Scaled(TuckAProblem):
        def tensors(self, dtype, adapter_dtype):
            return {
                name: t * scaled[name] if name in scaled else t for name, t in tensors(dtype, adapter_dtype).items()
            }

    again = Scaled(**{name: getattr(problem, name) for name in problem.__dataclass_fields__}).ours(torch.float64)
    assert_matches(again["output"], results["output"], 1e-12)


def test_routes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"group must be an integer from 0 to 1, got 2"):
        fixed_route(2, [1.0], 2, 1)
    with pytest.raises(ValueError, match=r"group must be an integer from 0 to 1, got True"):
        fixed_route(True, [1.0], 2, 1)
    with pytest.raises(ValueError, match=r"weights must hold 3 numbers"):
        fixed_route(0, [1.0], 2, 3)


def test_nothing_is_read_by_the_host() -> None:
    adapter = tucker_adapter(12, 10, TuckAConfig(r=3))
    adapter.shared.fixed = Route(torch.tensor([1]), torch.tensor([0.4, 0.6]))
    x, weight = torch.randn(2, 3, 12), torch.randn(10, 12)
    with Recorder() as recorder:
        adapter.linear(x, weight, None).sum().backward()
    assert not set(recorder.names()) & set(HOST_READS)
