"""Outputs and gradients of the interpreted kernels against ``reference.py``, every access to memory checked."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from interpreter_bf16 import correct_bf16
from interpreter_trace import traced
from pyramid_testing import (
    GROUPINGS,
    LAYOUTS,
    SKEWS,
    Case,
    Problem,
    assert_all_match,
    examples,
    from_seed,
    poisoned_memory,
    random_geometry,
    relative_error,
)

import ept_kernels
from ept_kernels import PyramidGeometry, reference
from ept_kernels.triton.backend import PLANS

#: An op, and who computes its base product.
OPS = {"delta": ("pyramid_delta", ""), **{plan: ("pyramid_linear", plan) for plan in PLANS}}

SMALL = PyramidGeometry(23, 19, 3, (2, 3, 5))
PAPER = PyramidGeometry(70, 50, 8, (2, 2, 4, 4, 6, 6, 8, 8))

EDGES = {
    "no rows": Case(SMALL, (0,)),
    "no rows, no samples": Case(SMALL, (0, 4), "sample", 2),
    "no rows in two samples": Case(SMALL, (2, 0), "sample", 2),
    "one row": Case(SMALL, (1,), "row", 5),
    "a vector": Case(SMALL, (), "one", 3),
    "a row block": Case(SMALL, (64,)),
    "a row block and a row": Case(SMALL, (65,)),
    "a row block less a row": Case(SMALL, (63,), "row", 3),
    "two row blocks, mixed groups": Case(SMALL, (127,), "row", 4),
    "segments of a row block": Case(SMALL, (2, 64), "sample", 3),
    "segments one over a row block": Case(SMALL, (2, 65), "sample", 3),
    "segments of half a block, still apart": Case(SMALL, (3, 32), "sample", 3),
    "segments below half a block, mixed": Case(SMALL, (5, 31), "sample", 3),
    "short segments, mixed": Case(SMALL, (33, 2), "sample", 4),
    "the paper's pyramid": Case(PAPER, (37,), "row", 4),
    "all scales from 1 to 16": Case(PyramidGeometry(37, 41, 3, tuple(range(1, 17))), (17,), "row", 2),
    "several rank blocks": Case(PyramidGeometry(40, 36, 17, (2, 4, 6, 8)), (19,), "row", 2),
    "several rank blocks, one group": Case(PyramidGeometry(40, 36, 33, (8, 16)), (19,)),
    "rank blocks below a matrix instruction": Case(PyramidGeometry(18, 17, 3, (1, *range(9, 17))), (5,)),
    "rank 1, scale 1": Case(PyramidGeometry(9, 7, 1, (1,)), (5,)),
    "scale as large as the layer": Case(PyramidGeometry(13, 13, 2, (13,)), (5,)),
    "one by one": Case(PyramidGeometry(1, 1, 1, (1,)), (4,)),
    "wide": Case(PyramidGeometry(301, 6, 4, (2, 5)), (9,)),
    "high": Case(PyramidGeometry(6, 301, 4, (2, 5)), (9,)),
    "several tiles of the base product": Case(PyramidGeometry(70, 130, 2, (2, 5)), (70,)),
    "no bias": Case(SMALL, (7,), bias=False),
    "a scale that no group uses": Case(SMALL, (40,), "row", 3, zero_scale=True),
    "a scale that is not used, one group": Case(SMALL, (40,), zero_scale=True),
    **{f"{layout} rows": Case(SMALL, (4, 9), "sample", 2, layout=layout) for layout in LAYOUTS},
    **{f"{skew} groups by row": Case(SMALL, (71,), "row", 6, skew=skew) for skew in SKEWS},
    **{f"{skew} groups by sample": Case(SMALL, (6, 20), "sample", 6, skew=skew) for skew in ("distinct", "huge runs")},
}


LEADS = ((0,), (1,), (16,), (17,), (61,), (64,), (65,), (2, 5), (3, 16), (3, 31), (2, 33), (5, 7), (2, 2, 9))


def random_case(rng: random.Random) -> Case:
    """Any call: scales up to 16, rank up to 17, rows around the block sizes, every grouping, skew and layout."""
    grouping = rng.choice(GROUPINGS)
    return Case(
        geometry=random_geometry(rng, largest=48, largest_scale=16, ranks=range(1, 18)),
        lead=rng.choice(LEADS),
        grouping=grouping,
        num_groups=1 if grouping == "none" else rng.randint(1, 7),
        layout=rng.choice(LAYOUTS),
        bias=rng.random() < 0.5,
        zero_scale=rng.random() < 0.3,
        seed=rng.randrange(1000),
        skew=rng.choice(SKEWS),
    )


def evaluated(problem: Problem, how: str) -> dict[str, torch.Tensor]:
    """Output and gradients, from memory that holds NaN before it is written, with every access checked."""
    op, base = OPS[how]
    with pytest.MonkeyPatch.context() as patch, poisoned_memory(), traced():
        patch.setenv("EPT_TRITON_BASE", base)
        return problem.evaluate(ept_kernels, op)


def assert_exact(problem: Problem, how: str) -> None:
    truth = problem.evaluate(reference, OPS[how][0], dtype=torch.float64)
    results = evaluated(problem, how)
    assert {result.dtype for result in results.values()} == {torch.float32}
    assert_all_match(results, truth, 1e-5)


@pytest.mark.parametrize(("name", "how"), [(name, list(OPS)[i % len(OPS)]) for i, name in enumerate(EDGES)])
def test_edge_cases(name: str, how: str) -> None:
    assert_exact(EDGES[name].tensors(torch.float32), how)


@pytest.mark.parametrize("how", OPS)
@given(case=from_seed(random_case))
@examples(4)
def test_random_cases(how: str, case: Case) -> None:
    assert_exact(case.tensors(torch.float32), how)


# --- half precision ---------------------------------------------------------------------------------------------------

ACCURACY = {
    "ungrouped": Case(PyramidGeometry(64, 48, 8, (2, 3, 4)), (70,)),
    "by sample": Case(PyramidGeometry(50, 96, 8, (2, 4, 7)), (4, 16), "sample", 3),
    "by row": Case(PyramidGeometry(96, 50, 16, (1, 2, 5)), (40,), "row", 3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ACCURACY.values(), ids=ACCURACY)
@pytest.mark.parametrize("how", OPS)
def test_half_error_at_most_twice_that_of_plain_torch(how: str, case: Case, dtype: torch.dtype) -> None:
    """fp32 A and B beside half rows; plain torch multiplies by the dense weight in the rows' dtype."""
    problem = case.tensors(dtype, adapter_dtype=torch.float32)
    op = OPS[how][0]
    truth, plain = problem.evaluate(reference, op, dtype=torch.float64), problem.evaluate(reference, op)
    with correct_bf16():
        ours = evaluated(problem, how)
    for name, value in ours.items():
        assert value.dtype == (torch.float32 if name in ("A", "B", "folded") else dtype), name
        error, allowed = relative_error(value, truth[name]), 2 * relative_error(plain[name], truth[name])
        assert error <= allowed, f"{name}: error {error:.2e}, plain torch allows {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["delta", "fused"])
def test_half_adapter(how: str, dtype: torch.dtype) -> None:
    """A, B and folded may be half, too; every gradient comes in the dtype of its tensor."""
    problem = ACCURACY["by sample"].tensors(dtype)
    truth = problem.evaluate(reference, OPS[how][0], dtype=torch.float64)
    with correct_bf16():
        results = evaluated(problem, how)
    assert {result.dtype for result in results.values()} == {dtype}
    assert_all_match(results, truth, 8 * torch.finfo(dtype).eps)


def test_half_sums_scales_and_rows_in_fp32() -> None:
    """A gradient rounded to half anywhere between its first and last sum would keep few of fp32's bits."""
    problem = ACCURACY["ungrouped"].tensors(torch.float16, adapter_dtype=torch.float32)
    results = evaluated(problem, "delta")
    for name in ("A", "B", "folded"):
        assert not torch.equal(results[name], results[name].half().float()), name


def test_mixed_strides_of_parameters() -> None:
    problem = Case(SMALL, (9,), "row", 4).tensors(torch.float32)
    turned = {name: getattr(problem, name).T.contiguous().T for name in ("A", "B", "folded", "weight")}
    assert not any(tensor.is_contiguous() for tensor in turned.values())
    sliced = {"bias": torch.stack([problem.bias, problem.bias], 1)[:, 0], "groups": problem.groups.repeat(2)[:9]}
    for how in OPS:
        assert_exact(replace(problem, **turned, **sliced), how)
