"""TuckA's layer on the interpreted kernels: scale 1, one group, against its definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter_bf16 import correct_bf16
from interpreter_trace import traced
from pyramid_testing import Case, assert_matches, poisoned_memory, relative_error
from tucka_testing import TuckAProblem

from ept_kernels import PyramidGeometry
from ept_kernels.triton.backend import PLANS

PROBLEMS = {
    "rank 8": TuckAProblem(Case(PyramidGeometry(70, 45, 8, (1,)), (3, 11)), masked=True),
    "more groups": TuckAProblem(Case(PyramidGeometry(33, 50, 8, (1,)), (2, 9)), num_groups=4, group_size=3),
    "rank 3, sliced, no bias": TuckAProblem(
        Case(PyramidGeometry(23, 19, 3, (1,)), (1, 17), layout="sliced", bias=False), core_rank=3
    ),
}


@pytest.mark.parametrize("whole", [True, False], ids=["linear", "update"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_definition(name: str, whole: bool) -> None:
    problem = PROBLEMS[name]
    truth, plain = problem.reference(torch.float32), problem.reference(torch.float32, compute=torch.float32)
    with poisoned_memory(), traced():
        results = problem.ours(torch.float32, whole=whole)
    for what, value in results.items():
        assert_matches(value, truth[what], max(1e-5, 2 * relative_error(plain[what], truth[what])), what)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_error_at_most_twice_that_of_plain_torch(monkeypatch, dtype: torch.dtype, plan: str) -> None:
    monkeypatch.setenv("EPT_GPU_PLAN", plan)
    problem = replace(PROBLEMS["rank 8"], case=Case(PyramidGeometry(64, 48, 8, (1,)), (2, 32)))
    truth = problem.reference(dtype, torch.float32)
    plain = problem.reference(dtype, torch.float32, compute=dtype)
    with correct_bf16(), poisoned_memory(), traced():
        results = problem.ours(dtype, torch.float32)
    for what, value in results.items():
        allowed = 2 * relative_error(plain[what], truth[what])
        assert relative_error(value, truth[what]) <= allowed, what
