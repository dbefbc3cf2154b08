"""``active``: what it promises is skipped, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from pyramid_testing import (
    Case,
    assert_all_match,
    assert_same_bits,
    expected_where_active,
    folded_entries,
    partly_active,
    poisoned_memory,
    random_case,
)

import ept_kernels
from ept_kernels import PyramidGeometry, active_scales

ROW_OPS = ("pyramid_delta", "pyramid_linear")
GEOMETRY = PyramidGeometry(23, 19, 3, (2, 3, 5, 5))
MIXED = Case(GEOMETRY, (5, 7), "sample", num_groups=4)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.usefixtures("backend")
def test_only_the_gradient_of_inactive_kernels_is_left_out(op: str, seed: int) -> None:
    problem = partly_active(replace(random_case(random.Random(seed)), seed=seed), torch.float32)
    with poisoned_memory():
        results = problem.evaluate(ept_kernels, op)
    assert_all_match(results, expected_where_active(problem, op), 1e-5)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("backend")
def test_a_kernel_at_zero_that_is_active_gets_its_gradient(op: str) -> None:
    problem = MIXED.tensors(torch.float32)
    active = torch.tensor([[True, False, True]]).expand(4, 3)
    problem = replace(problem, folded=torch.zeros_like(problem.folded), active=active)
    gradient = problem.evaluate(ept_kernels, op)["folded"]
    used = torch.zeros(4, 1, dtype=torch.bool).index_fill_(0, problem.groups, True)
    assert_same_bits(gradient != 0, folded_entries(active & used, GEOMETRY))


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("backend")
def test_everything_active_is_the_same_as_nothing_said(op: str) -> None:
    problem = MIXED.tensors(torch.float32)
    said = replace(problem, active=torch.ones(4, 3, dtype=torch.bool))
    plain = problem.evaluate(ept_kernels, op)
    for name, value in said.evaluate(ept_kernels, op).items():
        assert_same_bits(value, plain[name], name)


def test_it_goes_through_one_compiled_graph() -> None:
    problem = partly_active(MIXED)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.arguments("pyramid_linear").items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **named: problem.call(ept_kernels, "pyramid_linear", **named), fullgraph=True)
    output = compiled(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), problem.cotangent)
    results = {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_all_match(results, expected_where_active(problem, "pyramid_linear"), 1e-12)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (torch.ones(4, 2, dtype=torch.bool), r"active must be \[groups, scales\] = \[4, 3\], got \[4, 2\]"),
        (torch.ones(4, 3), "active must be a bool tensor, got torch.float32"),
    ],
)
@pytest.mark.parametrize("op", ROW_OPS)
def test_bad_input_is_named(op: str, active: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MIXED.tensors(), active=active).call(ept_kernels, op)


@pytest.mark.parametrize("sizes", [(2, 2, 4, 4, 6, 6, 8, 8), (4, 2, 8, 4, 2), (3,)])
def test_active_scales_are_those_of_the_selected_experts(sizes: tuple[int, ...]) -> None:
    geometry = PyramidGeometry(32, 24, 2, sizes)
    gates = torch.rand(9, len(sizes)) * (torch.rand(9, len(sizes)) < 0.3)
    for group, row in zip(active_scales(gates, geometry).tolist(), gates.tolist(), strict=True):
        selected = {k for gate, k in zip(row, sizes, strict=True) if gate}
        assert group == [scale in selected for scale in geometry.scales]
