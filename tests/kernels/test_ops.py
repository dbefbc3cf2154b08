"""The three public functions and their six ops, on every backend that serves a CPU, against ``reference.py``."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from pyramid_testing import (
    DIFFERENTIABLE,
    HOST_READS,
    LAYOUTS,
    Case,
    Problem,
    Recorder,
    assert_all_match,
    assert_matches,
    assert_same_bits,
    cases,
    examples,
    poisoned_memory,
    relative_error,
    tight,
)

import ept_kernels
from ept_kernels import PyramidGeometry, reference
from ept_kernels.backends import torch as torch_backend
from ept_kernels.problem import Base

OPS = tuple(DIFFERENTIABLE)
ROW_OPS = ("pyramid_delta", "pyramid_linear")

#: Widths that no scale divides, a scale of one expert and of two, mixed groups of which one is unused.
GEOMETRY = PyramidGeometry(11, 7, 3, (2, 3, 2, 5))
MIXED = Case(GEOMETRY, lead=(3, 2), grouping="sample", num_groups=4)
UNGROUPED = Case(GEOMETRY, lead=(3, 2))

EDGES = {
    "no rows": Case(GEOMETRY, lead=(0,)),
    "no rows, no samples": Case(GEOMETRY, lead=(0, 4), grouping="sample", num_groups=2),
    "no rows in two samples": Case(GEOMETRY, lead=(2, 0), grouping="sample", num_groups=2),
    "a vector": Case(GEOMETRY, lead=()),
    "a vector with a group": Case(GEOMETRY, lead=(), grouping="one", num_groups=3),
    "one row": Case(GEOMETRY, lead=(1,), grouping="row", num_groups=5),
    "prime rows": Case(GEOMETRY, lead=(31,), grouping="row", num_groups=4),
    "four dimensions": Case(GEOMETRY, lead=(3, 2, 2), grouping="sample", num_groups=2),
    "one by one": Case(PyramidGeometry(1, 1, 1, (1,)), lead=(4,)),
    "only scale 1": Case(PyramidGeometry(9, 6, 2, (1, 1)), lead=(4,)),
    "odd scales": Case(PyramidGeometry(17, 13, 2, (7, 3, 5, 1)), lead=(5,)),
    "a scale as large as the layer": Case(PyramidGeometry(6, 6, 2, (6, 6)), lead=(5,)),
    "wider than high": Case(PyramidGeometry(64, 5, 4, (2, 5)), lead=(5,)),
    "higher than wide": Case(PyramidGeometry(5, 64, 4, (2, 5)), lead=(5,)),
    "rank beyond the seed": Case(PyramidGeometry(8, 8, 16, (4,)), lead=(5,)),
    "a scale switched off": replace(MIXED, zero_scale=True),
    "no bias": replace(MIXED, bias=False),
    **{f"{layout} rows": replace(MIXED, layout=layout) for layout in LAYOUTS},
}


def exact(case: Case, op: str) -> dict[str, torch.Tensor]:
    """Output and gradients of the definition, in float64."""
    return case.tensors().evaluate(reference, op, dtype=torch.float64)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_edge_cases_match_the_reference(op: str, case: Case) -> None:
    assert_all_match(case.tensors().evaluate(ept_kernels, op), exact(case, op), tight())


@pytest.mark.parametrize("op", OPS)
@given(case=cases())
@examples(40)
@pytest.mark.usefixtures("backend")
def test_matches_the_reference_in_the_widest_dtype(op: str, case: Case) -> None:
    assert_all_match(case.tensors().evaluate(ept_kernels, op), exact(case, op), tight())


@pytest.mark.parametrize("op", OPS)
@given(case=cases())
@examples(25)
@pytest.mark.usefixtures("backend")
def test_matches_the_reference_in_float32(op: str, case: Case) -> None:
    problem = case.tensors(torch.float32)
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    results = problem.evaluate(ept_kernels, op)
    assert {result.dtype for result in results.values()} == {torch.float32}
    assert_all_match(results, truth, 1e-5)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("backend")
def test_dropout_is_that_of_torch_where_a_backend_does_not_fuse_it(op: str) -> None:
    """Rows are dropped before they come to the op; the base product of ``pyramid_linear`` sees all of them."""
    problem = MIXED.tensors()
    adapter = (problem.A, problem.B, problem.folded, problem.groups, problem.geometry)
    base = (problem.weight, problem.bias) if op == "pyramid_linear" else ()
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(problem.x, 0.4)
    expected = reference.pyramid_delta(dropped, *adapter)
    if base:
        expected = expected + torch.nn.functional.linear(problem.x, *base)
    torch.manual_seed(0)
    actual = getattr(ept_kernels, op)(problem.x, *base, *adapter, dropout_p=0.4)
    assert_matches(actual, expected, 1e-12 if actual.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_dropout_out_of_range_is_refused(op: str, p: float) -> None:
    problem = MIXED.tensors()
    base = (problem.weight, problem.bias) if op == "pyramid_linear" else ()
    adapter = (problem.A, problem.B, problem.folded, problem.groups, problem.geometry)
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got"):
        getattr(ept_kernels, op)(problem.x, *base, *adapter, dropout_p=p)


ACCURACY_CASES = {
    "ungrouped": Case(PyramidGeometry(64, 48, 8, (2, 3, 4)), lead=(37,)),
    "by sample": Case(PyramidGeometry(50, 96, 8, (2, 4, 7)), lead=(4, 16), grouping="sample", num_groups=3),
    "by row": Case(PyramidGeometry(96, 50, 16, (1, 2, 5)), lead=(40,), grouping="row", num_groups=3),
}


HALF = pytest.mark.parametrize(
    ("backend_name", "dtype"),
    [("torch", torch.bfloat16), ("torch", torch.float16), ("cpu", torch.bfloat16)],
    ids=["torch bf16", "torch fp16", "cpu bf16"],
)


@HALF
@pytest.mark.parametrize("case", ACCURACY_CASES.values(), ids=ACCURACY_CASES)
@pytest.mark.parametrize("op", ROW_OPS)
def test_half_error_at_most_twice_that_of_plain_torch(
    op: str, case: Case, backend_name: str, dtype: torch.dtype, force_backend: Callable[[str], None]
) -> None:
    """fp32 A and B beside half rows; plain torch multiplies by the dense weight in the rows' dtype."""
    force_backend(backend_name)
    problem = case.tensors(dtype, adapter_dtype=torch.float32)
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    ours, plain = problem.evaluate(ept_kernels, op), problem.evaluate(reference, op)
    for name, value in ours.items():
        assert value.dtype == (torch.float32 if name in ("A", "B", "folded") else dtype), name
        error, allowed = relative_error(value, truth[name]), 2 * relative_error(plain[name], truth[name])
        assert error <= allowed, f"{name}: error {error:.2e}, plain torch allows {allowed:.2e}"
        if name in ("A", "B"):
            assert not torch.equal(value, value.to(dtype).float()), f"{name}: scales are summed in fp32"


@HALF
@pytest.mark.parametrize("op", ROW_OPS)
def test_half_everything(op: str, backend_name: str, dtype: torch.dtype, force_backend: Callable[[str], None]) -> None:
    """A, B and folded may be half, too; every gradient comes in the dtype of its tensor."""
    force_backend(backend_name)
    problem = ACCURACY_CASES["by sample"].tensors(dtype)
    truth = problem.evaluate(reference, op, dtype=torch.float64)
    for name, value in problem.evaluate(ept_kernels, op).items():
        assert value.dtype == dtype, name
        assert_matches(value, truth[name], 8 * torch.finfo(dtype).eps, name)


@pytest.mark.parametrize("grouping", ["none", "sample", "row"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("torch_backend_forced")
def test_gradcheck(op: str, grouping: str) -> None:
    geometry = PyramidGeometry(5, 4, 2, (2, 3, 2))
    case = Case(geometry, lead=(2, 2), grouping=grouping, num_groups=1 if grouping == "none" else 3)
    problem = case.tensors()
    arguments = problem.arguments(op)
    leaves = [tensor.detach().requires_grad_() for tensor in arguments.values()]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return problem.call(ept_kernels, op, **dict(zip(arguments, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.usefixtures("backend")
def test_rows_of_one_segment_share_their_group_and_others_do_not() -> None:
    """Segments are runs of consecutive rows: [0, 0, 1, 1], not [0, 1, 0, 1]."""
    problem = Case(GEOMETRY, lead=(2, 2), grouping="sample", num_groups=2).tensors()
    problem = replace(problem, groups=torch.tensor([1, 0]))
    weight = reference.pyramid_weight(problem.A, problem.B, problem.folded, GEOMETRY)
    delta = problem.call(ept_kernels, "pyramid_delta")
    assert_matches(delta[0], problem.x[0] @ weight[1].T, tight())
    assert_matches(delta[1], problem.x[1] @ weight[0].T, tight())


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("backend")
def test_an_unused_group_gets_a_zero_gradient(op: str) -> None:
    problem = replace(MIXED.tensors(), groups=torch.tensor([3, 1, 3]))
    gradient = problem.evaluate(ept_kernels, op)["folded"]
    assert not gradient[0].any()
    assert not gradient[2].any()
    assert gradient[1].all()
    assert gradient[3].all()


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("backend")
def test_int32_groups(op: str) -> None:
    problem = MIXED.tensors()
    narrow = replace(problem, groups=problem.groups.int())
    assert_all_match(narrow.evaluate(ept_kernels, op), problem.evaluate(ept_kernels, op), 0.0)


@pytest.mark.usefixtures("backend")
def test_a_weight_that_is_not_contiguous() -> None:
    """GPT-2's Conv1D gives its weight transposed."""
    problem = MIXED.tensors()
    transposed = replace(problem, weight=problem.weight.T.contiguous().T)
    assert not transposed.weight.is_contiguous()
    assert_all_match(transposed.evaluate(ept_kernels, "pyramid_linear"), exact(MIXED, "pyramid_linear"), tight())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_parameters_that_are_not_contiguous(op: str) -> None:
    problem = MIXED.tensors()
    strided = replace(problem, **{name: getattr(problem, name).T.contiguous().T for name in ("A", "B", "folded")})
    assert_all_match(strided.evaluate(ept_kernels, op), exact(MIXED, op), tight())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_only_the_gradients_asked_for(op: str) -> None:
    """One argument at a time, and all but one: the same gradients, none for the others."""
    problem, truth = MIXED.tensors(), exact(MIXED, op)
    names = list(problem.arguments(op))
    singles = [(name,) for name in names]
    for wanted in [*singles, *itertools.combinations(names, len(names) - 1)]:
        leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in problem.arguments(op).items()}
        problem.call(ept_kernels, op, **leaves).backward(problem.cotangent_of(op))
        for name, leaf in leaves.items():
            if name in wanted:
                assert_matches(leaf.grad, truth[name], tight(), f"{name} of {wanted}")
            else:
                assert leaf.grad is None, f"{name} of {wanted}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_no_gradient_without_need(op: str) -> None:
    problem = MIXED.tensors()
    assert not problem.call(ept_kernels, op).requires_grad
    with torch.no_grad():
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.arguments(op).items()}
        assert not problem.call(ept_kernels, op, **leaves).requires_grad


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_backward_does_no_more_than_asked(needs: tuple[bool, ...]) -> None:
    """The backend gives None, and the op an empty tensor, for what nobody needs."""
    p = replace(MIXED, lead=(6,), grouping="row").tensors()
    arguments = (p.cotangent, p.x, p.A, p.B, p.folded, p.groups, list(GEOMETRY.scales), list(needs))
    everything = torch_backend.backward(p.cotangent, p.for_backends(), None, [True] * 4)
    given = torch_backend.backward(p.cotangent, p.for_backends(), None, needs)
    from_op = torch.ops.ept.pyramid_delta_backward(*arguments)
    for need, gradient, op_gradient, full in zip(needs, given, from_op, everything, strict=True):
        assert (gradient is not None) == need
        assert op_gradient.numel() == (full.numel() if need else 0)
        if need:
            assert_matches(gradient, full, 1e-14)


# --- manners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [UNGROUPED, MIXED, replace(MIXED, layout="strided")])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_inputs_are_never_written(op: str, case: Case) -> None:
    problem = case.tensors()
    tensors = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    before = {name: (value.clone(), value._version) for name, value in tensors.items()}
    problem.evaluate(ept_kernels, op)
    for name, (copy, version) in before.items():
        assert_same_bits(tensors[name], copy, name)
        assert tensors[name]._version == version, f"{name} was written to"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_results_do_not_share_memory_with_inputs(op: str) -> None:
    problem = replace(MIXED, zero_scale=True).tensors()
    storages = {v.untyped_storage().data_ptr() for v in vars(problem).values() if isinstance(v, torch.Tensor)}
    for name, result in problem.evaluate(ept_kernels, op).items():
        assert result.untyped_storage().data_ptr() not in storages, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_two_runs_are_equal_to_the_bit(op: str) -> None:
    problem = Case(PyramidGeometry(60, 50, 8, (2, 3, 5)), (32, 4), "sample", num_groups=3).tensors(torch.float32)
    first, second = (problem.evaluate(ept_kernels, op) for _ in range(2))
    for name, value in first.items():
        assert_same_bits(value, second[name], name)


@pytest.mark.parametrize("case", [UNGROUPED, MIXED, EDGES["no rows"]])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_uninitialised_memory_never_shows(op: str, case: Case) -> None:
    truth = exact(case, op)
    with poisoned_memory():
        assert torch.empty(1).isnan().all(), "the poison works"
        results = case.tensors().evaluate(ept_kernels, op)
    assert_all_match(results, truth, tight())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("backend")
def test_differentiating_twice_raises(op: str) -> None:
    """``ops.py``: the backward ops have no derivative of their own."""
    problem = MIXED.tensors()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.arguments(op).items()}
    output = problem.call(ept_kernels, op, **leaves)
    (gradient,) = torch.autograd.grad((output**2).sum(), leaves["A"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad((gradient**2).sum(), leaves["B"])


@pytest.mark.parametrize("grouping", ["none", "sample", "row"])
@pytest.mark.parametrize("op", ROW_OPS)
def test_no_host_read_and_no_dense_update(op: str, grouping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spec identities 1 and 2: no tensor as large as the weight but the weight itself, and no value read back."""
    geometry = PyramidGeometry(60, 64, 2, (2, 3))
    case = Case(geometry, lead=(4, 2), grouping=grouping, num_groups=1 if grouping == "none" else 3)
    problem = case.tensors()

    def record() -> tuple[set[str], list[tuple[str, list[int]]]]:
        leaves = {name: problem.arguments(op)[name].detach().requires_grad_() for name in ("x", "A", "B", "folded")}
        with Recorder() as recorder:
            problem.call(ept_kernels, op, **leaves).backward(problem.cotangent)
        assert all(leaf.grad is not None for leaf in leaves.values())
        return set(recorder.names()), recorder.large(problem.weight.numel(), besides=[problem.weight])

    monkeypatch.setenv("EPT_BACKEND", "torch")
    names, dense = record()
    assert "matmul" in names, "the recorder sees what runs inside the ops"
    assert not names & set(HOST_READS)
    assert dense == []
    monkeypatch.setenv("EPT_BACKEND", "reference")
    assert record()[1], "the check can fail: the reference has a dense update"


@pytest.mark.parametrize("grouped", [False, True])
def test_backend_reads_no_value(grouped: bool) -> None:
    """Meta tensors have no values: ``.item()``, ``.tolist()``, ``if tensor`` or a copy to the host would raise."""
    meta = lambda tensor: tensor.to("meta")  # noqa: E731
    p = (MIXED if grouped else UNGROUPED).tensors()
    call = p.for_backends()
    call = call._replace(**{name: meta(value) for name, value in call._asdict().items() if torch.is_tensor(value)})
    cotangent, base = meta(p.cotangent.flatten(0, -2)), Base(meta(p.weight), meta(p.bias))
    needs = [True] * 4
    torch_backend.forward(call, None)
    torch_backend.backward(cotangent, call, None, needs)
    torch_backend.forward(call, base)
    torch_backend.backward(cotangent, call, base.weight, needs)
    adapter, scales = (call.A, call.B, call.folded), GEOMETRY.scales
    dense = torch_backend.delta_weight(*adapter, GEOMETRY.in_features, GEOMETRY.out_features, scales)
    torch_backend.delta_weight_backward(dense, *adapter, scales, needs[1:])
    with pytest.raises((RuntimeError, NotImplementedError)):
        dense[0, 0, 0].item()


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("backend")
def test_autocast_runs_rows_in_bf16_and_keeps_fp32_gradients(op: str) -> None:
    problem = MIXED.tensors(torch.float32)
    casts = {
        name: tensor.bfloat16() for name, tensor in problem.arguments(op).items() if name in ("x", "weight", "bias")
    }
    expected = problem.call(ept_kernels, op, **casts)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.arguments(op).items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = problem.call(ept_kernels, op, **leaves)
    assert output.dtype == torch.bfloat16
    assert_same_bits(output, expected)
    output.backward(problem.cotangent.bfloat16())
    truth = exact(MIXED, op)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32, name
        assert_matches(leaf.grad, truth[name], 2e-2, name)


@pytest.mark.parametrize("backend_name", ["torch", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_float64_alone(op: str, backend_name: str, force_backend: Callable[[str], None]) -> None:
    force_backend(backend_name)
    problem = MIXED.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        output = problem.call(ept_kernels, op)
    assert_same_bits(output, problem.call(ept_kernels, op))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("backend")
def test_forward_mode_is_refused_and_never_wrong(op: str) -> None:
    """A native kernel would drop the tangent without a word."""
    problem = MIXED.tensors(torch.float32)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.x, torch.ones_like(problem.x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            problem.call(ept_kernels, op, x=dual)


def test_autocast_leaves_the_dense_weight_alone() -> None:
    problem = MIXED.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = problem.call(ept_kernels, "pyramid_weight")
    assert_same_bits(output, problem.call(ept_kernels, "pyramid_weight"))


# --- torch.library ----------------------------------------------------------------------------------------------------


def op_arguments(name: str, p: Problem) -> tuple:
    """Arguments of ``torch.ops.ept.<name>``, from a problem with 2-D rows."""
    g, scales = p.geometry, list(p.geometry.scales)
    factors = (p.A, p.B, p.folded)
    return {
        "pyramid_weight": (*factors, g.in_features, g.out_features, scales),
        "pyramid_weight_backward": (p.weight_cotangent, *factors, scales, [True, False, True]),
        "pyramid_delta": (p.x, *factors, p.groups, g.out_features, scales),
        "pyramid_delta_backward": (p.cotangent, p.x, *factors, p.groups, scales, [True, False, True, True]),
        "pyramid_linear": (p.x, p.weight, p.bias, *factors, p.groups, scales),
        "pyramid_linear_backward": (p.cotangent, p.x, p.weight, *factors, p.groups, scales, [True, True, False, True]),
    }[name]


@pytest.mark.parametrize("name", [f"{op}{suffix}" for op in OPS for suffix in ("", "_backward")])
@pytest.mark.parametrize(
    ("case", "backend_name"),
    [
        (Case(GEOMETRY, (6,)), "torch"),
        (Case(GEOMETRY, (6,), "row", num_groups=3), "torch"),
        (Case(GEOMETRY, (6,), "one", num_groups=2, bias=False), "reference"),
        (Case(GEOMETRY, (6,), "row", num_groups=3), "cpu"),
    ],
    ids=["ungrouped", "by row", "one group, no bias, reference", "by row, cpu"],
)
def test_opcheck(name: str, case: Case, backend_name: str, force_backend: Callable[[str], None]) -> None:
    force_backend(backend_name)
    arguments = op_arguments(name, case.tensors(torch.float32))
    if not name.endswith("_backward"):
        arguments = tuple(
            a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
        )
    torch.library.opcheck(getattr(torch.ops.ept, name).default, arguments)


@pytest.mark.parametrize("op", ROW_OPS)
def test_opcheck_of_what_is_kept(op: str, force_backend: Callable[[str], None]) -> None:
    """Forward gives U and the factors, backward takes them."""
    force_backend("torch")
    problem = Case(GEOMETRY, (6,), "row", num_groups=3).tensors()
    arguments = op_arguments(op, problem)
    leaves = tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    )
    torch.library.opcheck(getattr(torch.ops.ept, op).default, (*leaves, 0.0, None, None, True))
    with torch.no_grad():
        _, *kept = getattr(torch.ops.ept, op)(*arguments, 0.0, None, None, True)
    backward = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in op_arguments(f"{op}_backward", problem))
    torch.library.opcheck(getattr(torch.ops.ept, f"{op}_backward").default, (*backward, 0.0, None, None, *kept))


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.usefixtures("torch_backend_forced")
def test_what_is_computed_again_is_the_same(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = MIXED.tensors().evaluate(ept_kernels, op)
    monkeypatch.setenv("EPT_RECOMPUTE", "1")
    calls = []
    interleave = torch_backend.interleave
    monkeypatch.setattr(torch_backend, "interleave", lambda *args: (calls.append(1), interleave(*args))[1])
    for name, value in MIXED.tensors().evaluate(ept_kernels, op).items():
        assert_same_bits(value, kept[name], name)
    assert len(calls) == 2, "once in each direction"


def compiled_results(op: str, problem: Problem, **how: str) -> dict[str, torch.Tensor]:
    """Forward compiled without graph breaks, and the backward that came with it."""
    names = list(problem.arguments(op))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in problem.arguments(op).values()]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return 2 * problem.call(ept_kernels, op, **dict(zip(names, tensors, strict=True)))

    torch._dynamo.reset()
    output = torch.compile(function, fullgraph=True, **how)(*leaves)
    gradients = torch.autograd.grad(output, leaves, problem.cotangent_of(op) / 2)
    return {"output": output.detach() / 2, **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("case", [UNGROUPED, MIXED], ids=["ungrouped", "by sample"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph(op: str, case: Case) -> None:
    results = compiled_results(op, case.tensors(), backend="aot_eager")
    assert_all_match(results, exact(case, op), 1e-12)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="inductor needs a C++ compiler on a CPU")
def test_compiles_as_graphs_want_it() -> None:
    """The line that docs/gpu.md gives for CUDA graphs, through inductor."""
    results = compiled_results("pyramid_linear", MIXED.tensors(), mode="reduce-overhead")
    assert_all_match(results, exact(MIXED, "pyramid_linear"), 1e-12)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "A too narrow": ({"A": lambda p: p.A[:, 1:]}, r"A must be \[r, ceil\(in / k_min\)\] = \[3, 6\], got \[3, 5\]", OPS),
    "A of another rank": ({"A": lambda p: p.A[1:]}, r"A must be .* \[3, 6\], got \[2, 6\]", OPS),
    "B too short": ({"B": lambda p: p.B[1:]}, r"B must be \[ceil\(out / k_min\), r\] = \[4, 3\], got \[3, 3\]", OPS),
    "B transposed": ({"B": lambda p: p.B.T}, r"B must be .* \[4, 3\], got \[3, 4\]", OPS),
    "folded of another pyramid": (
        {"folded": lambda p: p.folded[:, 1:]},
        r"folded must be \[groups, 38\], got \[4, 37\]",
        OPS,
    ),
    "folded without groups": ({"folded": lambda p: p.folded[0]}, r"folded must be \[groups, 38\], got \[38\]", OPS),
    "A and B of two dtypes": ({"B": lambda p: p.B.float()}, "A and B must have one dtype, got .*64 and .*32", OPS),
    "x too wide": ({"x": lambda p: p.x.new_ones(2, 12)}, r"x must be \[..., in_features=11\], got \[2, 12\]", ROW_OPS),
    "x a scalar": ({"x": lambda p: p.x.sum()}, r"x must be \[..., in_features=11\], got \[\]", ROW_OPS),
    "x of integers": ({"x": lambda p: p.x.long()}, "x must be a floating-point tensor, got torch.int64", ROW_OPS),
    "no groups for several kernels": (
        {"groups": lambda p: None},
        "groups may be None only for one folded kernel, got 4",
        ROW_OPS,
    ),
    "groups that do not divide": (
        {"groups": lambda p: torch.zeros(4, dtype=torch.long)},
        "groups must have a length that divides the 6 rows of x, got 4",
        ROW_OPS,
    ),
    "no groups for some rows": (
        {"groups": lambda p: torch.zeros(0, dtype=torch.long)},
        "groups must have a length that divides the 6 rows of x, got 0",
        ROW_OPS,
    ),
    "no kernel for some rows": (
        {"folded": lambda p: p.folded[:0]},
        r"folded must hold a kernel for the 6 rows of x, got \[0, \d+\]",
        ROW_OPS,
    ),
    "groups of floats": (
        {"groups": lambda p: p.groups.double()},
        "groups must be a 1-D tensor of int64 or int32, got .* of torch.float64",
        ROW_OPS,
    ),
    "groups of booleans": ({"groups": lambda p: p.groups.bool()}, "groups must be a 1-D tensor of int64", ROW_OPS),
    "groups in two dimensions": (
        {"groups": lambda p: p.groups[None]},
        r"groups must be a 1-D tensor of int64 or int32, got \[1, 3\]",
        ROW_OPS,
    ),
    "weight transposed": (
        {"weight": lambda p: p.weight.T},
        r"weight must be \[out, in\] = \[7, 11\], got \[11, 7\]",
        ("pyramid_linear",),
    ),
    "weight of another dtype": (
        {"weight": lambda p: p.weight.float()},
        "weight must have the dtype of x, torch.float64, got torch.float32",
        ("pyramid_linear",),
    ),
    "bias too long": (
        {"bias": lambda p: p.bias.new_ones(8)},
        r"bias must be \[out\] = \[7\], got \[8\]",
        ("pyramid_linear",),
    ),
    "bias of another dtype": (
        {"bias": lambda p: p.bias.float()},
        "bias must have the dtype of x, torch.float64, got torch.float32",
        ("pyramid_linear",),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    changes: dict[str, Callable[[Problem], torch.Tensor | None]]
    changes, message, ops = BAD[what]
    problem = MIXED.tensors()
    broken = replace(problem, **{name: change(problem) for name, change in changes.items()})
    for op in ops:
        with pytest.raises(ValueError, match=message):
            broken.call(ept_kernels, op)


@pytest.mark.parametrize("backend_name", ["torch", "cpu"])
@pytest.mark.parametrize("group", [-1, 4])
def test_a_group_that_does_not_exist_is_refused(
    group: int, backend_name: str, force_backend: Callable[[str], None]
) -> None:
    force_backend(backend_name)
    problem = replace(MIXED.tensors(), groups=torch.tensor([0, group, 1]))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        problem.call(ept_kernels, "pyramid_delta")
