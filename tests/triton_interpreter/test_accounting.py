"""What a call costs: launches, memory taken, bytes asked for by the programs."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreter_trace import Launched, Trace, traced
from pyramid_testing import Case, Recorder, folded_entries, poisoned_memory

import ept_kernels
from ept_kernels import PyramidGeometry
from ept_kernels.triton.configs import row_spans
from ept_kernels.triton.plan import Plan, plan_for

MODEL = Path(__file__).parents[2] / "benchmarks" / "roofline_model.py"

#: Two row blocks and two column blocks of the fused product; scales that divide the blocks of channels.
GEOMETRY = PyramidGeometry(192, 160, 8, (2, 4, 8))
ROWS = 136
WIDTH = 8 * (2 + 4 + 8)
GROUPINGS = {"one group": ("none", 1, 1), "two tasks": ("sample", 2, 2), "every row": ("row", ROWS, 3)}


def run(
    grouping: str, base: str, dtype: torch.dtype, op: str = "pyramid_linear", scales: tuple[int, ...] | None = None
) -> tuple[Trace, Trace, dict]:
    """Forward and backward of one call: what was launched, and the memory that was taken by each.

    ``scales``: those that every group uses, of which the call is told; None: all, and nothing said.
    """
    how, samples, num_groups = GROUPINGS[grouping]
    lead = (samples, ROWS // samples) if how == "sample" else (ROWS,)
    problem = Case(GEOMETRY, lead, how, num_groups).tensors(dtype, adapter_dtype=torch.float32)
    if scales is not None:
        active = torch.tensor([[k in scales for k in GEOMETRY.scales]]).expand(num_groups, -1)
        folded = problem.folded.masked_fill(~folded_entries(active, GEOMETRY), 0)
        problem = replace(problem, folded=folded, active=active)
    leaves = {name: problem.arguments(op)[name].detach().requires_grad_() for name in ("x", "A", "B", "folded")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPT_TRITON_BASE", base)
        with Recorder() as in_forward, traced() as forward, poisoned_memory():
            output = problem.call(ept_kernels, op, **leaves)
        with Recorder() as in_backward, traced() as backward, poisoned_memory():
            torch.autograd.grad(output, list(leaves.values()), problem.cotangent)
    return forward, backward, {"forward": in_forward, "backward": in_backward}


def taken(recorder: Recorder) -> list[tuple[int, ...]]:
    """Shapes of the tensors that came into being, largest first."""
    shapes = [tuple(tensor.shape) for tensor in recorder.created if tensor.numel() > 1]
    return sorted(shapes, key=lambda shape: (-torch.Size(shape).numel(), shape))


@pytest.fixture(scope="module")
def fused() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPT_BACKEND", "triton")
        return {grouping: run(grouping, "fused", torch.float16) for grouping in GROUPINGS}


@pytest.fixture(scope="module")
def partly() -> dict:
    """As ``fused``, with the middle scale in no group's use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPT_BACKEND", "triton")
        return {grouping: run(grouping, "fused", torch.float16, scales=(2, 8)) for grouping in GROUPINGS}


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_launches_of_the_fused_linear(fused: dict, grouping: str) -> None:
    forward, backward, _ = fused[grouping]
    assert forward.kernels == ["shrink_kernel", "linear_kernel"]
    assert backward.kernels == [
        "shrink_kernel",
        "shrink_kernel",
        "linear_kernel",
        "factor_grad_kernel",
        "reduce_kernel",
    ]


def test_launches_beside_another_base() -> None:
    forward, backward, recorders = run("one group", "split", torch.float32)
    assert forward.kernels == ["shrink_kernel", "expand_kernel"]
    assert backward.kernels == [
        "shrink_kernel",
        "shrink_kernel",
        "expand_kernel",
        "factor_grad_kernel",
        "reduce_kernel",
    ]
    for when, product in (("forward", "linear"), ("backward", "matmul")):
        products = [name for name in recorders[when].names() if name in ("linear", "matmul", "mm", "addmm")]
        assert products == [product], "one product, torch's own"


def test_launches_of_the_delta() -> None:
    forward, backward, recorders = run("two tasks", "", torch.float32, "pyramid_delta")
    assert len(forward.kernels) == 2
    assert len(backward.kernels) == 5
    names = {name for recorder in recorders.values() for name in recorder.names()}
    assert not names & {"mm", "addmm", "matmul", "bmm", "einsum", "clone", "cat", "_to_copy"}


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_no_value_is_read_back(fused: dict, grouping: str) -> None:
    """Captured in a CUDA graph, a launch must not depend on values; grids come from shapes alone."""
    for trace in fused[grouping][:2]:
        for launched in trace.launches:
            assert all(type(size) is int for size in launched.grid)
    for recorder in fused[grouping][2].values():
        assert not {"_local_scalar_dense", "item", "nonzero"} & set(recorder.names())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_memory_taken(fused: dict, grouping: str) -> None:
    """Exactly: V, its bits, the result; backward U, V, dU, bits, dx, three gradients and their partial sums."""
    _, backward, recorders = fused[grouping]
    num_groups = GROUPINGS[grouping][2]
    plan = plan_for(GEOMETRY.rank, GEOMETRY.scales)
    rows, bits = (ROWS, WIDTH), (plan.rank_blocks, ROWS)
    assert taken(recorders["forward"]) == [(ROWS, 160), rows, bits]

    _, spans = row_spans(ROWS)
    shrink = backward.launches[1]
    units, block = shrink.tensors["partial_ptr"].tensor.shape[1], shrink.config["BLOCK_T"]
    blocks = {"one group": -(-ROWS // block), "two tasks": 2 * -(-(ROWS // 2) // block)}
    assert units == blocks.get(grouping, ROWS)
    expected = [
        *[rows] * 3,  # U, V, dU
        *[bits] * 2,
        (ROWS, 192),  # dx
        (plan.rank_blocks, units, GEOMETRY.folded_size),
        (spans, len(plan.scales), GEOMETRY.rank, 192),
        (spans, len(plan.scales), GEOMETRY.rank, 160),
        (GEOMETRY.rank, GEOMETRY.seed_width),
        (GEOMETRY.seed_height, GEOMETRY.rank),
        (num_groups, GEOMETRY.folded_size),
    ]
    assert sorted(taken(recorders["backward"])) == sorted(expected)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_no_dense_update_and_no_second_copy_of_the_rows(fused: dict, grouping: str) -> None:
    _, _, recorders = fused[grouping]
    for when, recorder in recorders.items():
        sizes = [torch.Size(shape).numel() for shape in taken(recorder)]
        assert max(sizes) < 192 * 160, "an update [out, in]"
        assert sum(size >= ROWS * 160 for size in sizes) == 1, f"{when}: the result alone is as large as the rows"


# --- bytes ------------------------------------------------------------------------------------------------------------


def cover(size: int, block: int) -> int:
    return -(-size // block)


def shrink_reads(launched: Launched, features: int, plan: Plan, itemsize: int, groups: int) -> dict[str, int]:
    """Every program reads its rows once, of the factor each active scale's slice, and its groups' kernels."""
    blocks = launched.grid[0] // plan.rank_blocks
    return {
        "x_ptr": ROWS * features * itemsize * plan.rank_blocks,
        "factor_ptr": 4 * plan.rank * sum(cover(features, k) for k in plan.scales) * blocks,
    }


def linear_reads(
    launched: Launched, inner: int, features: int, plan: Plan, itemsize: int, skipped: int = 0
) -> dict[str, int]:
    """A column of programs reads the rows once, a row of programs the weight; each reads its rows of V and slices."""
    down, across = cover(ROWS, launched.config["BLOCK_T"]), cover(features, launched.config["BLOCK_C"])
    assert launched.grid == (down * across,)
    return {
        "x_ptr": ROWS * inner * itemsize * across,
        "weight_ptr": inner * features * itemsize * down,
        "v_ptr": ROWS * plan.width * itemsize * across,
        "active_ptr": ROWS * 4 * plan.rank_blocks * across,
        "factor_ptr": 4 * plan.rank * sum(cover(features, k) for k in plan.scales) * down,
    }


def factor_grad_reads(launched: Launched, plan: Plan, itemsize: int) -> dict[str, int]:
    """x and dy are read once for each block of ranks; a block of channels reads the intermediates of all rows."""
    block = launched.config["BLOCK_C"]
    return {
        "x_ptr": ROWS * 192 * itemsize * plan.rank_blocks,
        "du_ptr": ROWS * plan.width * itemsize * cover(192, block),
        "dy_ptr": ROWS * 160 * itemsize * plan.rank_blocks,
        "v_ptr": ROWS * plan.width * itemsize * cover(160, block),
        "du_active_ptr": ROWS * 4 * plan.rank_blocks * cover(192, block),
        "v_active_ptr": ROWS * 4 * plan.rank_blocks * cover(160, block),
    }


def without(loaded: dict[str, int], *names: str) -> dict[str, int]:
    return {name: count for name, count in loaded.items() if name not in names}


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_bytes_read_are_those_of_the_grid(fused: dict, grouping: str) -> None:
    forward, backward, _ = fused[grouping]
    plan = plan_for(GEOMETRY.rank, GEOMETRY.scales)
    small = ("folded_ptr", "groups_ptr")
    shrunk, linear = forward.launches
    assert without(shrunk.loaded, *small) == shrink_reads(shrunk, 192, plan, 2, 1)
    assert without(linear.loaded, "bias_ptr") == linear_reads(linear, 192, 160, plan, 2)
    again, gradient, dx, factors, sums = backward.launches
    assert without(again.loaded, *small) == shrink_reads(again, 192, plan, 2, 1)
    intermediates = ROWS * WIDTH * 2
    assert without(gradient.loaded, *small) == {
        **shrink_reads(gradient, 160, plan, 2, 1),
        "u_saved_ptr": intermediates * 1,
    }
    assert dx.loaded == linear_reads(dx, 160, 192, plan, 2)
    assert factors.loaded == factor_grad_reads(factors, plan, 2)
    num_groups = GROUPINGS[grouping][2]
    entries = sums.tensors["partial_folded_ptr"].tensor.numel()
    assert sums.loaded["partial_a_ptr"] == factors.stored["partial_a_ptr"]
    assert sums.loaded["partial_b_ptr"] == factors.stored["partial_b_ptr"]
    assert sums.loaded["partial_folded_ptr"] <= 4 * entries * num_groups


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_result_is_written_once(fused: dict, grouping: str) -> None:
    forward, backward, _ = fused[grouping]
    for launched in (*forward.launches, *backward.launches):
        for name, count in launched.stored.items():
            tensor = launched.tensors[name].tensor
            assert count == tensor.numel() * tensor.element_size(), f"{launched.kernel}: {name}"


@pytest.mark.skipif(not MODEL.exists(), reason="benchmarks/roofline_model.py is not there")
@pytest.mark.parametrize("scales", [GEOMETRY.scales, (2, 8)], ids=["all scales", "one inactive"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_bytes_of_the_roofline_model(grouping: str, scales: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    """The model's tiled reads and writes are those of the launches, small tables aside."""
    sys.path.insert(0, str(MODEL.parent))
    try:
        model = importlib.import_module("roofline_model")
    finally:
        sys.path.remove(str(MODEL.parent))
    recorded = request.getfixturevalue("fused" if scales == GEOMETRY.scales else "partly")
    forward, backward, _ = recorded[grouping]
    tasks = GROUPINGS[grouping][2]

    def work(launched: Launched):
        _, spans = row_spans(ROWS)
        return model.Work(ROWS, GEOMETRY, scales, "fp16", tasks, row_block=launched.config["BLOCK_T"], splits=spans)

    def tiles(launched: Launched):
        return model.Tiles(launched.config["BLOCK_T"], launched.config["BLOCK_C"])

    def agree(launched: Launched, modelled, reads: dict[str, str], writes: dict[str, str]) -> None:
        for side, moved, names in (("reads", launched.loaded, reads), ("writes", launched.stored, writes)):
            for name, argument in names.items():
                assert moved[argument] == getattr(modelled, side)[name], f"{launched.kernel} {side} {name}"

    shrunk, linear = forward.launches
    again, gradient, dx, factors, sums = backward.launches
    apart = grouping != "two tasks"  # segments of 68 rows: the model tiles all rows as one
    slices = [{name: "factor_ptr"} if apart else {} for name in ("A", "B")]
    agree(shrunk, model.shrink(work(shrunk), tiles(shrunk)), {"x": "x_ptr", **slices[0]}, {"V": "v_ptr"})
    modelled = model.shrink(work(again), tiles(again), keep_u=True)
    agree(again, modelled, {"x": "x_ptr", **slices[0]}, {"U": "u_ptr", "V": "v_ptr"})
    sums_of_blocks = {"dfolded partials": "partial_ptr"} if grouping == "one group" else {}
    modelled = model.shrink_gradient(work(gradient), tiles(gradient))
    agree(gradient, modelled, {"dy": "x_ptr", "U": "u_saved_ptr", **slices[1]}, {"dU": "v_ptr", **sums_of_blocks})
    expanded = {"W": "weight_ptr", "V": "v_ptr", "B": "factor_ptr"}
    agree(linear, model.gemm_expand(work(linear), tiles(linear)), {"x": "x_ptr", **expanded}, {"y": "y_ptr"})
    expanded = {"W": "weight_ptr", "dU": "v_ptr", "A": "factor_ptr"}
    modelled = model.gemm_expand(work(dx), tiles(dx), backward=True)
    agree(dx, modelled, {"dy": "x_ptr", **expanded}, {"dx": "y_ptr"})
    rows = {"x": "x_ptr", "dU": "du_ptr", "dy": "dy_ptr", "V": "v_ptr"}
    partials = {"dA partials": "partial_a_ptr", "dB partials": "partial_b_ptr"}
    agree(factors, model.seed_gradients(work(factors), tiles(factors)), rows, partials)
    results = {"dA": "grad_a_ptr", "dB": "grad_b_ptr", "dfolded": "grad_folded_ptr"}
    if grouping == "one group":
        partials["dfolded partials"] = "partial_folded_ptr"
    agree(sums, model.reduce_gradients(work(gradient)), partials, results)
