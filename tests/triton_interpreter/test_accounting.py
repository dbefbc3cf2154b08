"""What a call costs: launches, products, memory taken, bytes asked for by the programs, nothing read back."""

from __future__ import annotations

import itertools

import pytest
import torch
from interpreter_trace import Trace, traced
from pyramid_testing import HOST_READS, Case, Recorder, assert_matches, poisoned_memory

import ept_kernels
from ept_kernels import PyramidGeometry, reference
from ept_kernels.problem import Base, Problem
from ept_kernels.triton import backend
from ept_kernels.triton import launch as launcher
from ept_kernels.triton.backend import PLANS

GEOMETRY = PyramidGeometry(96, 80, 4, (2, 4, 8))
ROWS, WIDTH = 24, 4 * (2 + 4 + 8)
GROUPINGS = {"one group": ("none", 1), "two tasks": ("sample", 2), "every row": ("row", 3)}


def run(grouping: str, plan: str = "library", dtype=torch.float32, active=None, recompute="", dropout_p: float = 0.0):
    """Forward and backward of one call: what was launched, and the operations beside, of each."""
    how, num_groups = GROUPINGS[grouping]
    lead = (2, ROWS // 2) if how == "sample" else (ROWS,)
    problem = Case(GEOMETRY, lead, how, num_groups).tensors(dtype, adapter_dtype=torch.float32)
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in ("x", "A", "B", "folded")}
    adapter = (leaves["A"], leaves["B"], leaves["folded"], problem.groups, GEOMETRY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPT_GPU_PLAN", plan)
        patch.setenv("EPT_RECOMPUTE", recompute)
        with Recorder() as in_forward, traced() as forward, poisoned_memory():
            arguments = (leaves["x"], problem.weight, problem.bias, *adapter)
            output = ept_kernels.pyramid_linear(*arguments, dropout_p=dropout_p, active=active)
        with Recorder() as in_backward, traced() as backward, poisoned_memory():
            torch.autograd.grad(output, list(leaves.values()), problem.cotangent)
    return forward, backward, in_forward, in_backward


def products(recorder: Recorder) -> list[str]:
    return [name for name in recorder.names() if name in ("mm", "addmm", "addmm_", "bmm", "matmul", "linear")]


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_launches_and_products(grouping: str) -> None:
    forward, backward, in_forward, in_backward = run(grouping)
    assert forward.kernels == ["interleave_kernel", "core_kernel"]
    assert backward.kernels == ["core_kernel", "kernel_grad_kernel", "gather_kernel"]
    assert len(products(in_forward)) == 3, "x Ahat^T, the base product, V Bhat added in place"
    assert len(products(in_backward)) == 5, "dy Bhat^T, dy W, dU Ahat added in place, dU^T x, V^T dy"
    for trace in (forward, backward):
        for launched in trace.launches:
            assert all(type(size) is int for size in launched.grid), "captured in a graph: grids come from shapes"
    for recorder in (in_forward, in_backward):
        assert not set(HOST_READS) & set(recorder.names())


def test_launches_of_plan_fused() -> None:
    forward, backward, in_forward, in_backward = run("two tasks", "fused", torch.float16)
    assert forward.kernels == ["interleave_kernel", "core_kernel", "fused_kernel"]
    assert backward.kernels == ["core_kernel", "kernel_grad_kernel", "fused_kernel", "gather_kernel"]
    assert (len(products(in_forward)), len(products(in_backward))) == (1, 3)


def test_launches_of_recomputation_and_of_dropout() -> None:
    forward, backward, _, _ = run("two tasks", recompute="1")
    assert forward.kernels == ["interleave_kernel", "core_kernel"]
    assert backward.kernels == ["interleave_kernel", "core_kernel", "kernel_grad_kernel", "gather_kernel"]
    forward, backward, _, _ = run("two tasks", dropout_p=0.1)
    assert forward.kernels == ["dropout_kernel", "interleave_kernel", "core_kernel"]
    assert sorted(backward.kernels) == ["core_kernel", *["dropout_kernel"] * 2, "gather_kernel", "kernel_grad_kernel"]


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_backward_launches_no_more_than_asked(needs: tuple[bool, ...]) -> None:
    problem = Case(PyramidGeometry(14, 12, 2, (2, 3)), (6,), "row", 2).tensors(torch.float32)
    truth = problem.evaluate(reference, "pyramid_delta", dtype=torch.float64)
    with poisoned_memory(), traced() as trace:
        gradients = backend.backward(problem.cotangent, problem.for_backends(), None, needs)
    for name, need, gradient in zip(("x", "A", "B", "folded"), needs, gradients, strict=True):
        assert (gradient is not None) == need, name
        if need:
            assert_matches(gradient, truth[name], 1e-5, name)
    need_x, need_A, need_B, need_folded = needs
    expected = ["interleave_kernel"] * any(needs) + ["core_kernel"] * (need_x or need_A or need_B)
    expected += ["kernel_grad_kernel"] * need_folded + ["gather_kernel"] * (need_A or need_B)
    assert trace.kernels == expected
    stored = {name for launched in trace.launches for name in launched.stored}
    assert ("v_ptr" in stored, "du_ptr" in stored) == (need_B, need_x or need_A)
    assert ("grad_a_ptr" in stored, "grad_b_ptr" in stored) == (need_A, need_B)


def test_the_dense_update_is_three_launches_for_all_groups() -> None:
    problem = Case(PyramidGeometry(11, 7, 2, (2, 3)), num_groups=5).tensors(torch.float32)
    with traced() as trace:
        problem.evaluate(ept_kernels, "pyramid_weight")
    forward, backward = trace.kernels[:2], trace.kernels[2:]
    assert forward == ["interleave_kernel", "core_kernel"]
    assert backward == ["interleave_kernel", "core_kernel", "kernel_grad_kernel", "gather_kernel"]


# --- memory and bytes -------------------------------------------------------------------------------------------------


def taken(recorder: Recorder) -> list[tuple[int, ...]]:
    return sorted(tuple(tensor.shape) for tensor in recorder.created if tensor.numel() > 1)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_memory_taken(grouping: str) -> None:
    """The interleaved factors, U, V and the result; in backward V again, dV, dU and the gradients."""
    _, _, in_forward, in_backward = run(grouping)
    hats, rows = {(WIDTH, 96), (WIDTH, 80)}, (ROWS, WIDTH)
    assert taken(in_forward) == sorted([*hats, rows, rows, (ROWS, 80)])
    groups = GROUPINGS[grouping][1]
    gradients = {(ROWS, 96), (4, 48), (40, 4), (groups, 1, GEOMETRY.folded_size)}
    assert set(taken(in_backward)) == {*hats, rows, *gradients}


def loaded(trace: Trace, kernel: str) -> dict[str, int]:
    return next(launched.loaded for launched in trace.launches if launched.kernel == kernel)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_bytes_read_and_written(grouping: str) -> None:
    """U and dV are read once by each of their kernels, a factor once for each scale, of its interleaved gradient what
    counts; every result is written once."""
    forward, backward, _, _ = run(grouping)
    rows = 4 * ROWS * WIDTH
    slices = {"a_ptr": 96, "b_ptr": 80}
    factors = {name: 4 * 4 * sum(-(-size // k) for k in GEOMETRY.scales) for name, size in slices.items()}
    assert loaded(forward, "interleave_kernel") == factors
    assert loaded(forward, "core_kernel")["u_ptr"] == rows
    for kernel, names in {"core_kernel": ("u_ptr", "dv_ptr"), "kernel_grad_kernel": ("u_ptr", "dv_ptr")}.items():
        assert {loaded(backward, kernel)[name] for name in names} == {rows}, kernel
    summed = {name: 4 * 4 * len(GEOMETRY.scales) * size for name, size in (("a_hat_ptr", 96), ("b_hat_ptr", 80))}
    assert loaded(backward, "gather_kernel") == summed
    if grouping == "one group":
        assert loaded(forward, "core_kernel")["folded_ptr"] == 4 * GEOMETRY.folded_size
    forward.assert_written_once()
    backward.assert_written_once()


def test_nothing_is_read_for_an_inactive_scale() -> None:
    """One group that uses scale 8 of (2, 4, 8)."""
    forward, backward, _, _ = run("one group", active=torch.tensor([[False, False, True]]))
    rows, kernel = 4 * ROWS * 4 * 8, 4 * 64
    reads = loaded(forward, "core_kernel")
    assert (reads["u_ptr"], reads["folded_ptr"]) == (rows, kernel)
    reads = loaded(backward, "core_kernel")
    assert (reads["u_ptr"], reads["dv_ptr"], reads["folded_ptr"]) == (rows, rows, 2 * kernel)
    reads = loaded(backward, "kernel_grad_kernel")
    assert (reads["u_ptr"], reads["dv_ptr"]) == (rows, rows)


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", ["none", "sample", "row"])
@pytest.mark.parametrize("plan", PLANS)
def test_grids_fit_a_gpu(plan: str, grouping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA allows 65535 programs along the second and third axis. Nothing runs here: meta tensors, no memory."""
    monkeypatch.setenv("EPT_GPU_PLAN", plan)
    grids: dict[str, list[tuple[int, ...]]] = {}
    monkeypatch.setattr(launcher, "runner", lambda kernel, grid, *_: grids.setdefault(kernel.__name__, []).append(grid))
    g, rows = PyramidGeometry(4096, 4096, 64, (2, 4, 6, 8, 16)), 2**23
    count = {"none": None, "sample": 2**18, "row": rows}[grouping]

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, weight = meta(rows, g.in_features), meta(rows, g.out_features), meta(g.out_features, g.in_features)
    A, B = meta(g.rank, g.seed_width), meta(g.seed_height, g.rank)
    folded = meta(1 if count is None else 9, g.folded_size)
    groups = None if count is None else meta(count, dtype=torch.int64)
    plain = Problem(x, A, B, folded, groups, None, g.out_features, g.scales)
    dropping = plain._replace(dropout_p=0.1, seed=meta(1, dtype=torch.int64))
    backend.forward(dropping, Base(weight, None))
    for problem in (plain, dropping):
        backend.backward(y, problem, weight, [True] * 4)
    expected = {"interleave_kernel", "core_kernel", "kernel_grad_kernel", "gather_kernel", "dropout_kernel"}
    assert set(grids) == expected | ({"fused_kernel"} if plan == "fused" else set())
    for kernel, launched in grids.items():
        for grid in launched:
            assert grid[0] < 2**31, kernel
            assert all(size <= 65535 for size in grid[1:]), f"{kernel}: {grid}"
