"""What the interpreted kernels do besides being right: NaN, zero kernels, unused inputs, determinism, large offsets."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from dataclasses import replace

import pytest
import torch
from interpreter_trace import traced
from pyramid_testing import Case, Problem, assert_all_match, assert_matches, assert_same_bits, poisoned_memory
from triton.runtime.interpreter import interpreter_builder

import ept_kernels
from ept_kernels import PyramidGeometry, reference
from ept_kernels.triton import backend
from ept_kernels.triton import launch as launcher
from ept_kernels.triton.backend import PLANS
from ept_kernels.triton.plan import plan_for, rows_for
from ept_kernels.triton.shrink import shrink

GEOMETRY = PyramidGeometry(22, 26, 3, (2, 3, 4))
CASES = {"one group": Case(GEOMETRY, (5,)), "by row": Case(GEOMETRY, (20,), "row", 3)}


def bad_rows(tensor: torch.Tensor) -> list[bool]:
    """Which rows hold NaN or infinity."""
    return (~tensor.isfinite()).any(1).tolist()


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rows", "bad"), [(1, [0]), (40, [33]), (70, range(64, 70))])
def test_a_bad_input_reaches_its_own_row_of_the_output_only(rows: int, bad, value: float) -> None:
    """Also where every row of a block is bad: nothing may take such rows for zero and skip them."""
    problem = Case(GEOMETRY, (rows,), "row", 2).tensors(torch.float32)
    x = problem.x.clone()
    x[list(bad), 7] = value
    expected = bad_rows(reference.pyramid_delta(x, problem.A, problem.B, problem.folded, problem.groups, GEOMETRY))
    assert [row for row, is_bad in enumerate(expected) if is_bad] == list(bad)
    assert bad_rows(problem.call(ept_kernels, "pyramid_delta", x=x)) == expected


@pytest.mark.parametrize("rows", [1, 20])
def test_a_bad_output_gradient_reaches_every_gradient_as_in_torch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Case(GEOMETRY, (rows,), "row", 2).tensors(torch.float32)
    problem = replace(problem, groups=torch.arange(rows) % 2)
    cotangent = problem.cotangent.clone()
    cotangent[rows - 1, 5] = float("nan")
    problem = replace(problem, cotangent=cotangent)
    actual = problem.evaluate(ept_kernels, "pyramid_delta")
    monkeypatch.setenv("EPT_BACKEND", "torch")
    expected = problem.evaluate(ept_kernels, "pyramid_delta")
    for name in ("x", "A", "B"):
        assert expected[name].isnan().any(), name
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name
    own = (rows - 1) % 2
    assert actual["folded"][own].isnan().all()
    assert not actual["folded"][1 - own].isnan().any(), "groups of other rows stay clean"


# --- kernels that are zero --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("base", PLANS)
def test_all_kernels_zero(case: Case, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh layer: the adapter adds nothing, and yet the gradient of its kernels is what makes it learn."""
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    problem = case.tensors(torch.float32)
    problem = replace(problem, folded=torch.zeros_like(problem.folded))
    truth = problem.evaluate(reference, "pyramid_linear", dtype=torch.float64)
    with poisoned_memory():
        results = problem.evaluate(ept_kernels, "pyramid_linear")
    assert_all_match(results, truth, 1e-5)
    assert not results["A"].any()
    assert not results["B"].any()
    assert results["folded"].any(1).all() or case.grouping == "row"


@pytest.mark.parametrize("length", [33, 3])
def test_groups_of_different_scales(length: int) -> None:
    """Each group uses two of four scales, and one group none; blocks of one group, and blocks that mix them."""
    geometry = PyramidGeometry(26, 22, 2, (2, 3, 5, 8))
    problem = Case(geometry, (5, length), "sample", 5).tensors(torch.float32)
    problem = replace(problem, groups=torch.tensor([4, 2, 0, 1, 3]))
    folded = problem.folded.clone()
    for group, inactive in enumerate([(0, 1), (2, 3), (1, 2), (0, 3), (0, 1, 2, 3)]):
        for scale in inactive:
            start, k = geometry.offsets[scale], geometry.scales[scale]
            folded[group, start : start + k * k] = 0
    problem = replace(problem, folded=folded)
    truth = problem.evaluate(reference, "pyramid_delta", dtype=torch.float64)
    with poisoned_memory(), traced() as trace:
        results = problem.evaluate(ept_kernels, "pyramid_delta")
    assert_all_match(results, truth, 1e-5)
    assert not results["output"][0].any(), "the group without scales adds nothing"
    active = trace.launches[0].tensors["active_ptr"].tensor[0].view(5, length)
    assert [set(row.tolist()) for row in active] == [{0}, {0b1001}, {0b1100}, {0b0011}, {0b0110}]


def test_an_inactive_scale_costs_no_load_of_its_slice() -> None:
    """One group that uses scale 8 alone reads the eighth of A that this scale uses, and the eighth of B."""
    geometry = PyramidGeometry(128, 128, 4, (2, 8))
    problem = Case(geometry, (16,)).tensors(torch.float32)
    folded = problem.folded.clone()
    folded[:, :4] = 0
    with traced() as trace:
        replace(problem, folded=folded).call(ept_kernels, "pyramid_delta")
    shrunk, expanded = trace.launches
    assert shrunk.loaded["factor_ptr"] == expanded.loaded["factor_ptr"] == 4 * 4 * 128 // 8


@pytest.mark.parametrize("grouping", ["sample", "row"])
def test_a_group_that_no_row_uses_gets_a_zero_gradient(grouping: str) -> None:
    problem = Case(GEOMETRY, (4, 6), grouping, 5).tensors(torch.float32)
    problem = replace(problem, groups=problem.groups % 2 * 3)
    with poisoned_memory():
        gradient = problem.evaluate(ept_kernels, "pyramid_delta", wanted=["folded"])["folded"]
    assert not gradient[[1, 2, 4]].any()
    assert gradient[[0, 3]].any(1).all()


@pytest.mark.parametrize("base", PLANS)
def test_int32_groups(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    problem = CASES["by row"].tensors(torch.float32)
    narrow = replace(problem, groups=problem.groups.int()).evaluate(ept_kernels, "pyramid_linear")
    for name, value in problem.evaluate(ept_kernels, "pyramid_linear").items():
        assert_same_bits(narrow[name], value, name)


# --- nothing that was not asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_backward_launches_no_more_than_asked(needs: tuple[bool, ...]) -> None:
    problem = Case(GEOMETRY, (6,), "row", 2).tensors(torch.float32)
    truth = problem.evaluate(reference, "pyramid_delta", dtype=torch.float64)
    arguments = (problem.x, problem.A, problem.B, problem.folded, problem.groups, list(GEOMETRY.scales))
    with poisoned_memory(), traced() as trace:
        gradients = backend.pyramid_delta_backward(problem.cotangent, *arguments, needs)
    for name, need, gradient in zip(("x", "A", "B", "folded"), needs, gradients, strict=True):
        assert (gradient is not None) == need, name
        if need:
            assert_matches(gradient, truth[name], 1e-5, name)

    need_x, need_A, need_B, need_folded = needs
    expected = ["shrink_kernel"] * ((need_B or need_folded) + (need_x or need_A or need_folded))
    expected += ["expand_kernel"] * need_x + ["factor_grad_kernel"] * (need_A or need_B)
    expected += ["reduce_kernel"] * (need_A or need_B or need_folded)
    assert trace.kernels == expected
    for launched in trace.launches:
        if launched.kernel == "factor_grad_kernel":
            assert ("x_ptr" in launched.loaded) == ("partial_a_ptr" in launched.stored) == need_A
            assert ("dy_ptr" in launched.loaded) == ("partial_b_ptr" in launched.stored) == need_B
        if launched.kernel == "shrink_kernel":
            of_x = launched.tensors["x_ptr"].tensor is problem.x
            assert ("u_ptr" in launched.stored) == (of_x and need_folded)
            assert ("v_ptr" in launched.stored) == (need_B if of_x else need_x or need_A)
            assert ("partial_ptr" in launched.stored) == (not of_x and need_folded)


# --- inputs and repeats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", PLANS)
def test_inputs_are_never_written_and_repeats_are_equal_to_the_bit(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    problem = Case(PyramidGeometry(60, 50, 8, (2, 3, 5)), (20, 4), "sample", 3, layout="sliced").tensors(torch.float32)
    tensors = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    before = {name: (value.clone(), value._version) for name, value in tensors.items()}
    first, second = (problem.evaluate(ept_kernels, "pyramid_linear") for _ in range(2))
    for name, (copy, version) in before.items():
        assert_same_bits(tensors[name], copy, name)
        assert tensors[name]._version == version, name
    for name, value in first.items():
        assert_same_bits(value, second[name], name)


@pytest.mark.parametrize("base", PLANS)
def test_row_sums_over_many_spans(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage of dA and dB in several spans of rows, the last one short."""
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    monkeypatch.setattr("ept_kernels.triton.configs.SPAN", 16)
    problem = Case(PyramidGeometry(12, 10, 3, (2, 3)), (77,), "row", 2).tensors(torch.float32)
    truth = problem.evaluate(reference, "pyramid_linear", dtype=torch.float64)
    with poisoned_memory(), traced() as trace:
        results = problem.evaluate(ept_kernels, "pyramid_linear")
    assert_all_match(results, truth, 1e-5)
    partial = next(each for each in trace.launches if each.kernel == "factor_grad_kernel").tensors["partial_a_ptr"]
    assert partial.tensor.shape == (5, 2, 3, 12)


# --- large -----------------------------------------------------------------------------------------------------------


def untouched(numbers: int) -> torch.Tensor:
    """fp32 memory of any size: pages that nobody writes to take none."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, 4 * numbers, flags=flags), dtype=torch.float32)


@pytest.mark.parametrize("spread", ["rows", "features"])
@pytest.mark.parametrize("base", ["fused", "single"])
def test_offsets_beyond_int32(base: str, spread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, or channels, so far apart in memory that their offsets need 64 bits; the interpreter checks overflow."""
    how = "pyramid_linear"
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    monkeypatch.setattr(interpreter_builder, "options", dataclasses.replace(interpreter_builder.options, debug=True))
    case = Case(PyramidGeometry(18, 20, 2, (2, 3)), (3,), "row", 2)
    problem = case.tensors(torch.float32)

    def far_apart(tensor: torch.Tensor) -> torch.Tensor:
        strides = (2**31 + 8, 1) if spread == "rows" else (1, 2**28)
        spans = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        return untouched(spans + 1).as_strided(tensor.shape, strides).copy_(tensor)

    far = replace(problem, x=far_apart(problem.x), cotangent=far_apart(problem.cotangent))
    assert_all_match(far.evaluate(ept_kernels, how), problem.evaluate(reference, how, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("grouping", ["none", "sample", "row"])
@pytest.mark.parametrize(("op", "base"), [("pyramid_delta", ""), *(("pyramid_linear", plan) for plan in PLANS)])
def test_grids_fit_a_gpu(op: str, base: str, grouping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA allows 65535 programs along the second and third axis. Nothing runs here: meta tensors, no memory."""
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    grids = {}

    def record(kernel, grid, arguments, constants, config) -> None:
        grids.setdefault(kernel.__name__, []).append(grid)

    monkeypatch.setattr(launcher, "runner", record)
    geometry, rows = PyramidGeometry(4096, 4096, 64, (2, 4, 6, 8, 16)), 2**23
    counts = {"none": None, "sample": 2**18, "row": rows}

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    g = geometry
    x, y, weight = meta(rows, g.in_features), meta(rows, g.out_features), meta(g.out_features, g.in_features)
    A, B = meta(g.rank, g.seed_width), meta(g.seed_height, g.rank)
    folded = meta(1 if grouping == "none" else 9, g.folded_size)
    groups = None if grouping == "none" else meta(counts[grouping], dtype=torch.int64)
    scales, needs = list(g.scales), [True] * 4
    if op == "pyramid_delta":
        backend.pyramid_delta(x, A, B, folded, groups, g.out_features, scales)
        backend.pyramid_delta_backward(y, x, A, B, folded, groups, scales, needs)
    else:
        backend.pyramid_linear(x, weight, None, A, B, folded, groups, scales)
        backend.pyramid_linear_backward(y, x, weight, A, B, folded, groups, scales, needs)
    assert set(grids) >= {"shrink_kernel", "factor_grad_kernel", "reduce_kernel"}
    for kernel, launched in grids.items():
        for grid in launched:
            assert grid[0] < 2**31, kernel
            assert all(size <= 65535 for size in grid[1:]), f"{kernel}: {grid}"


# --- tiling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "segments", "aligned", "blocks"),
    [(0, 0, True, 0), (0, 2, False, 0), (64, 1, True, 1), (65, 1, True, 2), (96, 3, True, 3), (93, 3, False, 2)],
)
def test_tiling_of_rows(rows: int, segments: int, aligned: bool, blocks: int) -> None:
    tiling = rows_for(rows, segments, 64)
    assert (tiling.aligned, tiling.blocks) == (aligned, blocks)
    assert tiling.units == (blocks if aligned else rows)


def test_rank_blocks_cover_every_rank_once() -> None:
    for rank, scales in itertools.product((1, 7, 8, 17, 64), ((1,), (2, 4, 6, 8), tuple(range(1, 17)))):
        plan = plan_for(rank, scales)
        assert (plan.rank_blocks - 1) * plan.rank_block < rank <= plan.rank_blocks * plan.rank_block
        assert all(count >= plan.rank_block for count in plan.ranks)


def test_u_and_v_of_several_rank_blocks() -> None:
    """The intermediates themselves, from which dA, dB and dKbar are made."""
    geometry = PyramidGeometry(40, 36, 17, (2, 3, 8))
    problem: Problem = Case(geometry, (19,), "row", 2).tensors(torch.float32)
    plan = plan_for(geometry.rank, geometry.scales)
    assert plan.rank_blocks > 1
    with poisoned_memory(), traced():
        u, v, _, _, _ = shrink(problem.x, problem.A, problem.folded, problem.groups, plan, keep_u=True)
    for scale, k in enumerate(geometry.scales):
        columns = slice(geometry.columns[scale], geometry.columns[scale] + geometry.rank * k)
        width = geometry.widths[scale]
        rows = torch.nn.functional.pad(problem.x.double(), (0, width * k - 40)).view(-1, width, k)
        expected = torch.einsum("pj,tjq->tpq", problem.A[:, :width].double(), rows)
        assert_matches(u[:, columns].reshape(expected.shape), expected, 1e-5, f"U of scale {k}")
        kernel = problem.folded[problem.groups, geometry.offsets[scale] :][:, : k * k].view(-1, k, k).double()
        expected = torch.einsum("tpq,taq->tpa", expected, kernel)
        assert_matches(v[:, columns].reshape(expected.shape), expected, 1e-5, f"V of scale {k}")
