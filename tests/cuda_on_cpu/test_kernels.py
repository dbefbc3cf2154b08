"""The CUDA kernels, executed on a CPU behind their real binding and backend, against ``reference.py``."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from pyramid_testing import (
    DIFFERENTIABLE,
    HOST_READS,
    LAYOUTS,
    Case,
    Recorder,
    assert_all_match,
    assert_matches,
    assert_same_bits,
    cases,
    examples,
    poisoned_memory,
    relative_error,
)

import ept_kernels
from ept_kernels import PyramidGeometry, reference

OPS = tuple(DIFFERENTIABLE)
ROW_OPS = ("pyramid_delta", "pyramid_linear")
HALF = (torch.bfloat16, torch.float16)
GEOMETRY = PyramidGeometry(45, 70, 3, (2, 3, 2, 5, 8))
MIXED = Case(GEOMETRY, lead=(4, 9), grouping="sample", num_groups=5, zero_groups=(0, 3))
UNGROUPED = replace(MIXED, grouping="none", num_groups=1, zero_groups=())

EDGES = {
    "no rows": replace(UNGROUPED, lead=(0,)),
    "no rows, no samples": replace(MIXED, lead=(0, 4)),
    "no rows in two samples": replace(MIXED, lead=(2, 0)),
    "one row": replace(MIXED, lead=(1,), grouping="row"),
    "prime rows": replace(MIXED, lead=(67,), grouping="row"),
    "rows of one group among many": replace(MIXED, lead=(67,), grouping="one"),
    "ungrouped": UNGROUPED,
    "a scale switched off": replace(MIXED, zero_scale=True),
    "one by one": Case(PyramidGeometry(1, 1, 1, (1,)), lead=(19,)),
    "scale 1 alone, which is a plain low rank": Case(PyramidGeometry(70, 45, 8, (1,)), lead=(67,)),
    "every scale up to 16": Case(PyramidGeometry(50, 33, 2, tuple(range(1, 17))), lead=(18,)),
    "a scale wider than a warp": Case(PyramidGeometry(101, 83, 2, (33, 70)), lead=(18,)),
    "as many ranks as columns of a tile": Case(PyramidGeometry(30, 30, 16, (1, 2)), lead=(18,)),
    "more chunks of rows than warps that add them up": Case(PyramidGeometry(6, 5, 2, (2, 3)), lead=(701,)),
    "more columns than a round": Case(PyramidGeometry(70, 150, 17, (4, 9)), lead=(70,)),
    **{f"{layout} rows": replace(MIXED, layout=layout) for layout in LAYOUTS},
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
@pytest.mark.usefixtures("cuda")
def test_edges(case: Case, dtype: torch.dtype) -> None:
    """Outputs and every gradient of the three ops; memory that a kernel forgets to write holds NaN."""
    problem = case.tensors(dtype, adapter_dtype=torch.float32)
    for op in OPS:
        truth = problem.evaluate(reference, op, dtype=torch.float64)
        with poisoned_memory():
            results = problem.evaluate(ept_kernels, op)
        for name, value in results.items():
            assert value.dtype == (torch.float32 if name in ("A", "B", "folded") or op == OPS[0] else dtype), name
            tolerance = 1e-5 if dtype == torch.float32 or op == "pyramid_weight" else 4 * torch.finfo(dtype).eps
            assert_matches(value, truth[name], tolerance, f"{op}'s {name}")


@pytest.mark.parametrize("op", OPS)
@given(case=cases())
@examples(15)
@pytest.mark.usefixtures("cuda")
def test_random_calls_in_float32(op: str, case: Case) -> None:
    problem = case.tensors(torch.float32)
    with poisoned_memory():
        results = problem.evaluate(ept_kernels, op)
    assert_all_match(results, problem.evaluate(reference, op, dtype=torch.float64), 1e-5)


ACCURACY_CASES = {
    "ungrouped": Case(PyramidGeometry(64, 48, 8, (2, 3, 4)), lead=(37,)),
    "by sample": Case(PyramidGeometry(50, 96, 8, (2, 4, 7)), lead=(4, 16), grouping="sample", num_groups=3),
    "by row": Case(PyramidGeometry(96, 50, 16, (1, 2, 5)), lead=(40,), grouping="row", num_groups=3),
}


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ACCURACY_CASES.values(), ids=ACCURACY_CASES)
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("cuda")
def test_half_error_at_most_twice_that_of_plain_torch(op: str, case: Case, dtype: torch.dtype) -> None:
    problem = case.tensors(dtype, adapter_dtype=torch.float32)
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    ours, plain = problem.evaluate(ept_kernels, op), problem.evaluate(reference, op)
    for name, value in ours.items():
        error, allowed = relative_error(value, truth[name]), 2 * relative_error(plain[name], truth[name])
        assert error <= allowed, f"{name}: error {error:.2e}, plain torch allows {allowed:.2e}"
        if name in ("A", "B"):
            assert not torch.equal(value, value.to(dtype).float()), f"{name}: scales are summed in fp32"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("cuda")
def test_adapters_in_half(op: str) -> None:
    """A, B and folded may be half, too; every gradient comes in the dtype of its tensor."""
    problem = MIXED.tensors(torch.bfloat16)
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    for name, value in problem.evaluate(ept_kernels, op).items():
        assert value.dtype == torch.bfloat16, name
        assert_matches(value, truth[name], 2e-2, name)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("cuda")
def test_int32_groups_and_strided_parameters(op: str) -> None:
    problem = MIXED.tensors(torch.float32)
    other = replace(
        problem,
        groups=problem.groups.int().repeat_interleave(2)[::2],
        weight=problem.weight.T.contiguous().T,
        **{name: getattr(problem, name).T.contiguous().T for name in ("A", "B", "folded")},
    )
    assert_all_match(other.evaluate(ept_kernels, op), problem.evaluate(ept_kernels, op), 1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("cuda")
def test_only_the_gradients_asked_for(op: str) -> None:
    problem = MIXED.tensors(torch.float32)
    everything = problem.evaluate(ept_kernels, op)
    for name in problem.arguments(op):
        alone = problem.evaluate(ept_kernels, op, wanted=[name])
        assert_same_bits(alone[name], everything[name], name)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("cuda")
def test_a_skipped_scale_has_a_gradient_and_an_unused_group_has_none(op: str) -> None:
    """Kernels start at zero: without a gradient they would stay there."""
    problem = replace(MIXED, zero_scale=True).tensors(torch.bfloat16, adapter_dtype=torch.float32)
    problem = replace(problem, groups=torch.tensor([4, 1, 4, 4]))
    gradient = problem.evaluate(ept_kernels, op)["folded"]
    assert gradient[1, GEOMETRY.offsets[-1] :].all()
    assert gradient[4].all()
    assert not gradient[[0, 2, 3]].any()


@pytest.mark.usefixtures("cuda")
def test_an_infinite_row_of_a_skipped_scale_stays_out_of_the_output() -> None:
    """Nothing is multiplied by a kernel of zeros where all of a tile skips it; a NaN in a kernel is not skipped."""
    problem = UNGROUPED.tensors(torch.float32)
    folded = torch.zeros_like(problem.folded)
    x = torch.full_like(problem.x, float("inf"))
    assert not replace(problem, folded=folded, x=x).call(ept_kernels, "pyramid_delta").any()
    folded[0, 0] = float("nan")
    assert replace(problem, folded=folded).call(ept_kernels, "pyramid_delta").isnan().any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("cuda")
def test_the_same_call_gives_the_same_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the threads of a block run in another order."""
    problem = MIXED.tensors(torch.bfloat16, adapter_dtype=torch.float32)
    results = []
    for reverse in "01":
        monkeypatch.setenv("EPT_SHIM_REVERSED", reverse)
        results.append(problem.evaluate(ept_kernels, op))
    for name, value in results[0].items():
        assert_same_bits(results[1][name], value, name)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.usefixtures("cuda")
def test_merged_weight(dtype: torch.dtype) -> None:
    """Added in fp32, rounded once."""
    problem = MIXED.tensors(dtype, adapter_dtype=torch.float32)
    merged = ept_kernels.pyramid_merge(problem.weight, problem.A, problem.B, problem.folded, GEOMETRY)
    update = reference.pyramid_weight(problem.A.double(), problem.B.double(), problem.folded.double(), GEOMETRY)
    assert merged.dtype == dtype
    assert_matches(merged, problem.weight.double() + update, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("cuda")
def test_nothing_is_read_back_to_the_host(op: str) -> None:
    with Recorder() as recorder:
        MIXED.tensors(torch.float32).evaluate(ept_kernels, op)
    assert not set(recorder.names()) & set(HOST_READS)


@pytest.mark.usefixtures("cuda")
def test_inputs_are_not_written() -> None:
    problem = MIXED.tensors(torch.bfloat16, adapter_dtype=torch.float32)
    for op in OPS:
        before = {name: tensor.clone() for name, tensor in problem.arguments(op).items()}
        problem.evaluate(ept_kernels, op)
        for name, tensor in problem.arguments(op).items():
            assert_same_bits(tensor, before[name], name)


@pytest.mark.usefixtures("cuda")
def test_the_kernels_named_are_the_ones_that_run(cuda: str) -> None:
    """Tensor cores round A and B to the rows' dtype, SIMT kernels do not."""
    problem = MIXED.tensors(torch.bfloat16, adapter_dtype=torch.float32)
    gradient = problem.evaluate(ept_kernels, "pyramid_delta", wanted=["folded"])["folded"]
    truth = problem.evaluate(reference, "pyramid_delta", dtype=torch.float64)["folded"]
    exact = relative_error(gradient, truth) < 1e-5
    assert exact == (os.environ["EPT_SHIM_CAPABILITY"] == "7") == (cuda == "simt")
