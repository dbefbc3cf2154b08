"""``active``: scales that a group does not use are skipped on the device; what they leave unwritten is never read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter_trace import Trace, traced
from pyramid_testing import (
    Case,
    Problem,
    assert_all_match,
    assert_same_bits,
    expected_where_active,
    folded_entries,
    partly_active,
    poisoned_memory,
)

import ept_kernels
from ept_kernels import PyramidGeometry
from ept_kernels.triton.backend import PLANS

#: An op, and who computes its base product.
OPS = {"delta": ("pyramid_delta", ""), **{plan: ("pyramid_linear", plan) for plan in PLANS}}

GEOMETRY = PyramidGeometry(26, 22, 3, (2, 3, 5, 8))
CASES = {
    "one group": Case(GEOMETRY, (37,), seed=3),
    "samples apart": Case(GEOMETRY, (4, 33), "sample", 5),
    "samples mixed": Case(GEOMETRY, (7, 9), "sample", 5),
    "rows": Case(GEOMETRY, (70,), "row", 6, skew="zipf"),
    "several rank blocks": Case(PyramidGeometry(26, 22, 17, (2, 3, 5, 8)), (33,), "row", 3),
    "transposed rows": Case(GEOMETRY, (3, 40), "sample", 2, layout="transposed"),
}


def evaluated(problem: Problem, how: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], Trace]:
    op, base = OPS[how]
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    with poisoned_memory(), traced() as trace:
        return problem.evaluate(ept_kernels, op), trace


@pytest.mark.parametrize(
    ("name", "how"), [(name, list(OPS)[(i + j) % len(OPS)]) for i, name in enumerate(CASES) for j in (0, 1)]
)
def test_values_and_gradients(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of inactive scales are zero as promised, some of active ones too; unwritten memory is NaN."""
    problem = partly_active(CASES[name], torch.float32)
    results, _ = evaluated(problem, how, monkeypatch)
    assert_all_match(results, expected_where_active(problem, OPS[how][0]), 1e-5)
    inactive = ~folded_entries(problem.active, problem.geometry)
    assert not results["folded"][inactive].any()


@pytest.mark.parametrize("masked", [True, False], ids=["active given", "nothing said"])
@pytest.mark.parametrize("how", ["delta", "single"])
def test_kernels_of_rows_are_summed_in_two_stages(how: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row a unit, in several spans: still five launches, and the same bits again."""
    monkeypatch.setattr("ept_kernels.triton.configs.SPAN", 16)
    problem = partly_active(Case(GEOMETRY, (77,), "row", 3), torch.float32)
    if not masked:
        problem = replace(problem, active=None)
    truth = expected_where_active(replace(problem, active=torch.ones(3, 4) > 0) if not masked else problem, OPS[how][0])
    results, trace = evaluated(problem, how, monkeypatch)
    assert_all_match(results, truth, 1e-5)
    sums = next(launched for launched in trace.launches if launched.kernel == "factor_grad_kernel")
    assert sums.tensors["partial_folded_ptr"].tensor.shape == (5, 3, GEOMETRY.folded_size)
    assert sum(launched.kernel != "expand_kernel" for launched in trace.launches) <= 6
    again, _ = evaluated(problem, how, monkeypatch)
    assert_same_bits(again["folded"], results["folded"])


def test_kernels_of_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With A and B frozen the first stage has a launch of its own."""
    monkeypatch.setattr("ept_kernels.triton.configs.SPAN", 16)
    problem = partly_active(Case(GEOMETRY, (50,), "row", 3), torch.float32)
    with poisoned_memory(), traced() as trace:
        gradient = problem.evaluate(ept_kernels, "pyramid_delta", wanted=["folded"])["folded"]
    assert trace.kernels[2:] == ["shrink_kernel", "shrink_kernel", "factor_grad_kernel", "reduce_kernel"]
    assert_all_match({"folded": gradient}, {"folded": expected_where_active(problem, "pyramid_delta")["folded"]}, 1e-5)


def test_an_inactive_scale_costs_nothing_in_the_backward() -> None:
    """One group that uses scale 8 of (2, 8): an eighth of A and of B, that scale's U, V, dU and dKbar, and no more."""
    geometry, rows = PyramidGeometry(128, 128, 4, (2, 8)), 16
    problem = Case(geometry, (rows,)).tensors(torch.float32)
    active = torch.tensor([[False, True]])
    problem = replace(problem, folded=problem.folded.masked_fill(~folded_entries(active, geometry), 0), active=active)
    with poisoned_memory(), traced() as trace:
        problem.evaluate(ept_kernels, "pyramid_delta")
    _, _, again, gradient, dx, factors, sums = trace.launches
    of_slice, of_core = 4 * 4 * 128 // 8, 4 * rows * 4 * 8
    for launched in (again, gradient, dx):
        assert launched.loaded["factor_ptr"] == of_slice, launched.kernel
    assert again.stored["u_ptr"] == gradient.loaded["u_saved_ptr"] == of_core
    assert again.loaded["folded_ptr"] == gradient.loaded["folded_ptr"] == 4 * 64
    assert gradient.stored["partial_ptr"] == sums.loaded["partial_folded_ptr"] == 4 * 64
    across = -(-128 // factors.config["BLOCK_C"])
    assert factors.loaded["du_ptr"] == factors.loaded["v_ptr"] == of_core * across
    assert dx.loaded["v_ptr"] == of_core * -(-128 // dx.config["BLOCK_C"])


# --- groups that do not exist -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False], ids=["active given", "nothing said"])
@pytest.mark.parametrize(("how", "lead"), [("delta", (40,)), ("fused", (3, 33)), ("single", (40,))])
def test_a_group_that_does_not_exist_makes_its_rows_nan(
    how: str, lead: tuple[int, ...], active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read out of bounds (checked by the trace), and a result that nobody takes for right."""
    case = Case(GEOMETRY, lead, "row" if len(lead) == 1 else "sample", 3)
    problem = partly_active(case, torch.float32)
    groups = problem.groups.clone()
    groups[1], groups[-1] = 3, -1
    problem = replace(problem, groups=groups, active=problem.active if active else None)
    results, _ = evaluated(problem, how, monkeypatch)
    strange = torch.zeros(len(groups), dtype=torch.bool)
    strange[[1, -1]] = True
    for name in ("output", "x"):
        rows = results[name].reshape(len(groups), -1)
        assert torch.equal(rows.isnan().any(1), strange), name
        assert rows[strange].isnan().all() or name == "x"
    assert not results["folded"].isnan().any(), "such a row is nobody's"
