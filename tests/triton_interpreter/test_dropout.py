"""Dropout in the ops: forward, backward and every recomputation see the same mask of Philox."""

from __future__ import annotations

import pytest
import torch
from interpreter_trace import traced
from pyramid_testing import Case, assert_matches, poisoned_memory
from small_kernels_testing import expected_mask

import ept_kernels
from ept_kernels import PyramidGeometry, reference

P = 0.3
CASES = {
    "one group": Case(PyramidGeometry(30, 34, 2, (2, 3)), lead=(19,)),
    "by sample": Case(PyramidGeometry(14, 20, 3, (2, 5)), lead=(3, 5), grouping="sample", num_groups=2),
    "transposed": Case(PyramidGeometry(13, 9, 2, (3,)), lead=(8,), grouping="row", num_groups=3, layout="transposed"),
}
NAMES = ("x", "A", "B", "folded")


def drawn_seed(torch_seed: int) -> int:
    torch.manual_seed(torch_seed)
    return torch.randint(2**62, (1,)).item()


@pytest.mark.parametrize("recompute", ["", "1"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("op", ["pyramid_delta", "pyramid_linear"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_see_one_mask(
    case: Case, op: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPT_RECOMPUTE", recompute)
    problem, geometry = case.tensors(torch.float32), case.geometry
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in NAMES}
    exact = {name: getattr(problem, name).double().requires_grad_() for name in NAMES}
    mask = expected_mask(drawn_seed(5), leaves["x"].shape[:-1].numel(), geometry.in_features, P)
    dropped = exact["x"] * mask.view(exact["x"].shape)
    truth = reference.pyramid_delta(dropped, exact["A"], exact["B"], exact["folded"], problem.groups, geometry)
    base = ()
    if op == "pyramid_linear":
        base, truth = (problem.weight, None), truth + exact["x"] @ problem.weight.double().T
    torch.manual_seed(5)
    adapter = (leaves["A"], leaves["B"], leaves["folded"], problem.groups, geometry)
    with poisoned_memory(), traced():
        actual = getattr(ept_kernels, op)(leaves["x"], *base, *adapter, dropout_p=P)
        actual.backward(problem.cotangent)
    truth.backward(problem.cotangent.double())
    assert_matches(actual.detach(), truth.detach(), 1e-5)
    for name in NAMES:
        assert_matches(leaves[name].grad, exact[name].grad, 1e-5, name)


@pytest.mark.parametrize("wanted", [("x",), ("B", "folded"), ("A",)])
def test_some_gradients_alone(wanted: tuple[str, ...]) -> None:
    """Each is that of the whole, bit for bit."""
    case = CASES["by sample"]
    problem = case.tensors(torch.float32)

    def gradients(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        leaves = {name: getattr(problem, name).clone().requires_grad_(name in names) for name in NAMES}
        torch.manual_seed(7)
        arguments = (leaves["A"], leaves["B"], leaves["folded"], problem.groups, case.geometry)
        output = ept_kernels.pyramid_linear(leaves["x"], problem.weight, None, *arguments, dropout_p=P)
        grads = torch.autograd.grad(output, [leaves[name] for name in names], problem.cotangent)
        return dict(zip(names, grads, strict=True))

    everything = gradients(NAMES)
    for name, value in gradients(wanted).items():
        assert torch.equal(value, everything[name]), name


def layer_of(case: Case):
    """A function of the rows with dropout, and its rows."""
    problem = case.tensors(torch.float32)
    adapter = (problem.A, problem.B, problem.folded, problem.groups, case.geometry)

    def layer(rows: torch.Tensor) -> torch.Tensor:
        return ept_kernels.pyramid_linear(rows, problem.weight, None, *adapter, dropout_p=P)

    return layer, problem


def test_checkpointing_replays_the_mask() -> None:
    layer, problem = layer_of(CASES["by sample"])
    x = problem.x.clone().requires_grad_()
    torch.manual_seed(3)
    layer(x).sum().backward()
    plain, x.grad = x.grad, None
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, plain)


def test_masks_differ_from_call_to_call_and_drop_the_share_that_was_asked() -> None:
    geometry = PyramidGeometry(128, 32, 1, (1,))
    ones, A, B, folded = torch.ones(32, 128), torch.ones(1, 128), torch.ones(32, 1), torch.ones(1, 1)
    torch.manual_seed(0)
    first, second = (ept_kernels.pyramid_delta(ones, A, B, folded, None, geometry, dropout_p=P) for _ in range(2))
    assert not torch.equal(first, second)
    kept = first[:, 0] * (1 - P)  # a row's output counts the entries that were kept
    assert abs(kept.sum().item() / 64**2 - (1 - P)) < 5 * (P * (1 - P) / 64**2) ** 0.5


def test_a_compiled_call_draws_from_the_generator() -> None:
    layer, problem = layer_of(CASES["by sample"])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    expected = layer(problem.x)
    torch.manual_seed(4)
    assert torch.equal(compiled(problem.x), expected)
    assert not torch.equal(compiled(problem.x), expected)


def test_inductor_replays_the_mask_in_backward() -> None:
    """The default compiler may compute again in backward what forward drew; the layer is linear in x, so that
    ``<dx, x> = <dy, y>`` whatever the mask, if it is one and the same."""
    layer, problem = layer_of(CASES["by sample"])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    outputs = []
    for _ in range(2):
        x = problem.x.clone().requires_grad_()
        outputs.append(compiled(x))
        (gradient,) = torch.autograd.grad(outputs[-1], x, problem.cotangent)
        inside, outside = (x * gradient).sum().double(), (outputs[-1] * problem.cotangent).sum().double()
        assert abs(inside - outside) < 1e-4 * (outputs[-1].norm() * problem.cotangent.norm())
    assert (outputs[0] - outputs[1]).norm() > 0.1 * outputs[0].norm(), "another call, another mask"
