"""Outputs and gradients of the four ops on the interpreted kernels against ``reference.py``, every access checked."""

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
    assert_matches,
    assert_same_bits,
    assert_twice_as_wrong_at_most,
    examples,
    expected_where_active,
    folded_entries,
    from_seed,
    partly_active,
    poisoned_memory,
    random_geometry,
    shake,
)

import ept_kernels
from ept import EPTConfig, EPTLinear
from ept_kernels import PyramidGeometry, reference

#: An op, and the plan that adds its update.
OPS = {
    "delta": ("pyramid_delta", "library"),
    "library": ("pyramid_linear", "library"),
    "fused": ("pyramid_linear", "fused"),
    "weight": ("pyramid_weight", "library"),
}
ROW_OPS = ("delta", "library", "fused")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

SMALL = PyramidGeometry(23, 19, 2, (2, 3, 5))
SAMPLES = Case(SMALL, (4, 9), "sample", 2)

EDGES = {
    "no rows": Case(SMALL, (0,)),
    "no rows in two samples": Case(SMALL, (2, 0), "sample", 2),
    "one row": Case(SMALL, (1,), "row", 5),
    "a vector": Case(SMALL, (), "one", 3),
    "rows beyond a tile": Case(SMALL, (65,), "sample", 2),
    "the paper's pyramid": Case(PyramidGeometry(37, 26, 4, (2, 2, 4, 4, 6, 6, 8, 8)), (17,), "row", 3),
    "scale as large as the layer": Case(PyramidGeometry(13, 13, 2, (13,)), (5,)),
    "one by one": Case(PyramidGeometry(1, 1, 1, (1,)), (4,)),
    "wide": Case(PyramidGeometry(131, 6, 2, (2, 5)), (9,)),
    "high": Case(PyramidGeometry(6, 131, 2, (2, 5)), (9,)),
    "no bias": Case(SMALL, (7,), bias=False),
    "a scale that no group uses": Case(SMALL, (12,), "row", 3, zero_scale=True),
    **{f"{layout} rows": replace(SAMPLES, layout=layout) for layout in LAYOUTS},
    **{f"{skew} groups": Case(SMALL, (21,), "row", 4, skew=skew) for skew in ("distinct", "zipf runs")},
}


def evaluated(problem: Problem, how: str) -> dict[str, torch.Tensor]:
    """Output and gradients, from memory that holds NaN before it is written, with every access checked."""
    op, plan = OPS[how]
    with pytest.MonkeyPatch.context() as patch, poisoned_memory(), traced(), correct_bf16():
        patch.setenv("EPT_GPU_PLAN", plan)
        return problem.evaluate(ept_kernels, op)


def assert_right(problem: Problem, how: str) -> None:
    truth = problem.evaluate(reference, OPS[how][0], dtype=torch.float64)
    results, dtype = evaluated(problem, how), problem.x.dtype
    assert {value.dtype for value in results.values()} == {dtype}
    assert_all_match(results, truth, 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)


def dtype_of(how: str) -> torch.dtype:
    """Plan ``fused`` is for half precision."""
    return torch.float16 if how == "fused" else torch.float32


@pytest.mark.parametrize(("name", "how"), [(name, ROW_OPS[i % 3]) for i, name in enumerate(EDGES)])
def test_edge_cases(name: str, how: str) -> None:
    assert_right(EDGES[name].tensors(dtype_of(how)), how)


def random_case(rng: random.Random) -> Case:
    """Any call: scales up to 12, every grouping, skew and layout."""
    grouping = rng.choice(GROUPINGS)
    return Case(
        geometry=random_geometry(rng, largest=30, largest_scale=12, ranks=(1, 2, 3, 5)),
        lead=rng.choice(((0,), (1,), (17,), (2, 5), (3, 16), (5, 7), (2, 2, 9))),
        grouping=grouping,
        num_groups=1 if grouping == "none" else rng.randint(1, 5),
        layout=rng.choice(LAYOUTS),
        bias=rng.random() < 0.5,
        zero_scale=rng.random() < 0.3,
        seed=rng.randrange(1000),
        skew=rng.choice(SKEWS),
    )


@pytest.mark.parametrize("how", ROW_OPS)
@given(case=from_seed(random_case))
@examples(3)
def test_random_cases(how: str, case: Case) -> None:
    assert_right(case.tensors(dtype_of(how)), how)


@pytest.mark.parametrize("how", ["delta", "fused"])
def test_mixed_strides_of_parameters(how: str) -> None:
    problem = Case(SMALL, (9,), "row", 4).tensors(dtype_of(how))
    turned = {name: getattr(problem, name).T.contiguous().T for name in ("A", "B", "folded", "weight")}
    assert not any(tensor.is_contiguous() for tensor in turned.values())
    sliced = {"bias": torch.stack([problem.bias, problem.bias], 1)[:, 0], "groups": problem.groups.repeat(2)[:9]}
    assert_right(replace(problem, **turned, **sliced), how)


# --- half precision ---------------------------------------------------------------------------------------------------

ACCURACY = {
    "ungrouped": Case(PyramidGeometry(64, 48, 4, (2, 3, 4)), (70,)),
    "by row": Case(PyramidGeometry(50, 96, 8, (1, 2, 7)), (24,), "row", 3),
}


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("case", ACCURACY.values(), ids=ACCURACY)
@pytest.mark.parametrize("how", ROW_OPS)
def test_half_error_at_most_twice_that_of_plain_torch(how: str, case: Case, dtype: torch.dtype) -> None:
    """fp32 A and B beside half rows; plain torch multiplies by the dense weight in the rows' dtype."""
    problem = case.tensors(dtype, adapter_dtype=torch.float32)
    results = evaluated(problem, how)
    assert_twice_as_wrong_at_most(results, problem, reference, OPS[how][0])
    for name, value in results.items():
        assert value.dtype == (torch.float32 if name in ("A", "B", "folded") else dtype), name
    for name in ("A", "B", "folded"):
        assert not torch.equal(results[name], results[name].to(dtype).float()), f"{name}: summed in half"


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("how", ["delta", "fused"])
def test_half_adapter(how: str, dtype: torch.dtype) -> None:
    """A, B and folded may be half, too; every gradient comes in the dtype of its tensor."""
    assert_right(Case(PyramidGeometry(50, 37, 4, (2, 4, 7)), (4, 6), "sample", 3).tensors(dtype), how)


# --- inactive scales, groups that do not exist ------------------------------------------------------------------------

GEOMETRY = PyramidGeometry(26, 22, 2, (2, 3, 5))
ACTIVE = {
    "one group": Case(GEOMETRY, (17,), seed=3),
    "samples": Case(GEOMETRY, (5, 9), "sample", 4),
    "rows": Case(GEOMETRY, (30,), "row", 5, skew="zipf"),
}


@pytest.mark.parametrize(("name", "how"), [(name, ROW_OPS[i]) for i, name in enumerate(ACTIVE)])
def test_inactive_scales(name: str, how: str) -> None:
    """Kernels of inactive scales are zero as promised, some of active ones too; unwritten memory is NaN."""
    dtype = dtype_of(how)
    problem = partly_active(ACTIVE[name], dtype)
    results = evaluated(problem, how)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert_all_match(results, expected_where_active(problem, OPS[how][0]), tolerance)
    assert not results["folded"][~folded_entries(problem.active, problem.geometry)].any()


@pytest.mark.parametrize(("how", "lead"), [("delta", (20,)), ("library", (4, 5)), ("fused", (4, 5))])
def test_a_group_that_does_not_exist_makes_its_rows_nan(how: str, lead: tuple[int, ...]) -> None:
    """No read out of bounds, and a result that nobody takes for right."""
    problem = partly_active(Case(GEOMETRY, lead, "row" if len(lead) == 1 else "sample", 3), dtype_of(how))
    groups = problem.groups.clone()
    groups[1], groups[-1] = 3, -1
    results = evaluated(replace(problem, groups=groups), how)
    strange = torch.zeros(len(groups), dtype=torch.bool)
    strange[[1, -1]] = True
    for name in ("output", "x"):
        rows = results[name].reshape(len(groups), -1)
        assert torch.equal(rows.isnan().all(1), strange), name
        assert torch.equal(rows.isnan().any(1), strange), name
    assert not results["folded"].isnan().any(), "such a row is nobody's"


def test_a_bad_number_reaches_its_own_row_only() -> None:
    for value in (float("nan"), float("inf")):
        problem = Case(GEOMETRY, (20,), "row", 2).tensors(torch.float16)
        x = problem.x.clone()
        x[13, 7] = value
        for how in ROW_OPS:
            output = evaluated(replace(problem, x=x), how)["output"]
            assert (~output.isfinite()).any(1).nonzero().flatten().tolist() == [13]


# --- the dense update -------------------------------------------------------------------------------------------------

WEIGHTS = {
    "odd sizes": Case(PyramidGeometry(11, 7, 3, (2, 3, 2, 5)), num_groups=2),
    "the paper's pyramid": Case(PyramidGeometry(19, 26, 2, (2, 4, 6, 8))),
    "one by one": Case(PyramidGeometry(1, 1, 1, (1,))),
    "many groups": Case(PyramidGeometry(5, 4, 2, (2,)), num_groups=7),
    "a scale switched off": Case(PyramidGeometry(11, 7, 3, (2, 3)), num_groups=2, zero_scale=True),
}


@pytest.mark.parametrize("case", WEIGHTS.values(), ids=WEIGHTS)
def test_dense_update_and_gradients(case: Case) -> None:
    assert_right(case.tensors(torch.float32), "weight")


def test_dense_update_of_strided_tensors() -> None:
    problem = WEIGHTS["odd sizes"].tensors(torch.float32)
    names = ("A", "B", "folded", "weight_cotangent")
    strided = {name: getattr(problem, name).mT.contiguous().mT for name in names}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_right(replace(problem, **strided), "weight")
    expanded = torch.ones(()).expand(problem.weight_cotangent.shape)  # what ``output.sum().backward()`` passes on
    assert_right(replace(problem, weight_cotangent=expanded), "weight")


def test_dense_update_in_half() -> None:
    for dtype in HALF.values():
        problem = WEIGHTS["the paper's pyramid"].tensors(dtype)
        assert_twice_as_wrong_at_most(evaluated(problem, "weight"), problem, reference, "pyramid_weight")


def test_dense_update_of_no_groups() -> None:
    results = evaluated(replace(WEIGHTS["odd sizes"], num_groups=0).tensors(torch.float32), "weight")
    assert results["output"].shape == (0, 7, 11)
    assert results["folded"].shape[0] == 0
    assert not results["A"].any() and not results["B"].any()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_merge_adds_in_fp32_and_rounds_once(dtype: torch.dtype, layout: str) -> None:
    p = WEIGHTS["odd sizes"].tensors(dtype, adapter_dtype=torch.float32)
    weight = {
        "contiguous": p.weight,
        "transposed": p.weight.T.contiguous().T,
        "strided": torch.stack([p.weight, -p.weight], dim=2)[..., 0],
    }[layout]
    before = weight.clone()
    update = reference.pyramid_weight(p.A.double(), p.B.double(), p.folded.double(), p.geometry)
    with poisoned_memory(), traced():
        merged = ept_kernels.pyramid_merge(weight, p.A, p.B, p.folded, p.geometry)
    assert merged.dtype == dtype
    assert_matches(merged, weight.double() + update, 1e-6 if dtype == torch.float32 else 2.0**-11)
    assert_same_bits(weight, before)


def test_a_layer_merges_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = shake(EPTLinear(11, 7, config=EPTConfig(r=3, kernel_sizes=(2, 3, 2, 4), num_tasks=3), dtype=torch.float16))
    layer.merge(1)
    merged = layer.weight.clone()
    layer.unmerge()
    monkeypatch.setenv("EPT_BACKEND", "torch")
    layer.merge(1)
    assert_matches(merged, layer.weight, torch.finfo(torch.float16).eps)


# --- manners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ROW_OPS)
def test_inputs_are_never_written_and_repeats_are_bit_identical(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are results that keep nothing for the backward."""
    problem = Case(PyramidGeometry(30, 25, 3, (2, 3, 5)), (5, 4), "sample", 3, layout="sliced").tensors(torch.float16)
    tensors = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    before = {name: (value.clone(), value._version) for name, value in tensors.items()}
    first, second = evaluated(problem, how), evaluated(problem, how)
    monkeypatch.setenv("EPT_RECOMPUTE", "1")
    recomputed = evaluated(problem, how)
    for name, (copy, version) in before.items():
        assert_same_bits(tensors[name], copy, name)
        assert tensors[name]._version == version, name
    for name, value in first.items():
        assert_same_bits(value, second[name], name)
        assert_same_bits(value, recomputed[name], name)


def test_int32_groups() -> None:
    problem = Case(SMALL, (9,), "row", 4).tensors(torch.float32)
    wide, narrow = (evaluated(each, "delta") for each in (problem, replace(problem, groups=problem.groups.int())))
    for name, value in wide.items():
        assert_same_bits(narrow[name], value, name)


def test_a_group_that_no_row_uses_gets_a_zero_gradient() -> None:
    problem = Case(SMALL, (4, 6), "sample", 5).tensors(torch.float32)
    gradient = evaluated(replace(problem, groups=problem.groups % 2 * 3), "delta")["folded"]
    assert not gradient[[1, 2, 4]].any()
    assert gradient[[0, 3]].any(1).all()
