"""Fused dropout: the mask is Philox of an entry's coordinates, and forward and backward see the same one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyramid_testing import Case, assert_matches

import ept_kernels
from ept_kernels import PyramidGeometry, reference

P = 0.3
CASES = {
    "one group": Case(PyramidGeometry(70, 34, 3, (2, 3, 4)), lead=(19,)),
    "by sample": Case(PyramidGeometry(34, 70, 8, (2, 8)), lead=(3, 5), grouping="sample", num_groups=2),
    "by row": Case(PyramidGeometry(33, 18, 2, (3, 5)), lead=(18,), grouping="row", num_groups=4),
}


def philox(seed: int, c0: np.ndarray, c1: np.ndarray) -> np.ndarray:
    """First word of Philox4x32-10 (Salmon et al. 2011) for counters ``(c0, c1, 0, 0)``."""
    counters = [c0.astype(np.uint64), c1.astype(np.uint64), np.zeros_like(c0, np.uint64), np.zeros_like(c0, np.uint64)]
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = counters[0] * np.uint64(0xD2511F53), counters[2] * np.uint64(0xCD9E8D57)
        counters = [
            (second >> shift) ^ counters[1] ^ keys[0],
            second & low,
            (first >> shift) ^ counters[3] ^ keys[1],
            first & low,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return counters[0]


def expected_mask(seed: int, rows: int, features: int) -> torch.Tensor:
    """``[rows, features]``, 1 / (1 - p) where an entry is kept and 0 where it is dropped."""
    row, column = np.meshgrid(np.arange(rows), np.arange(features), indexing="ij")
    word = philox(seed, column, row).astype(np.uint32).view(np.int32).astype(np.int64)
    uniform = np.where(word < 0, -word - 1, word) * 4.6566127342e-10
    return torch.from_numpy(uniform >= P).double() / (1 - P)


def drawn_seed(torch_seed: int) -> int:
    torch.manual_seed(torch_seed)
    return torch.randint(2**62, (1,)).item()


@pytest.mark.parametrize("base", ["fused", "single", "split"])
@pytest.mark.parametrize("op", ["pyramid_delta", "pyramid_linear"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_see_one_mask(case: Case, op: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TRITON_BASE", base)
    problem = case.tensors(torch.float32)
    names = ("x", "A", "B", "folded")
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in names}
    exact = {name: getattr(problem, name).double().requires_grad_() for name in names}
    geometry = case.geometry
    mask = expected_mask(drawn_seed(5), leaves["x"].shape[:-1].numel(), geometry.in_features)
    groups = problem.groups
    dropped = exact["x"] * mask.view(exact["x"].shape)
    truth = reference.pyramid_delta(dropped, exact["A"], exact["B"], exact["folded"], groups, geometry)
    adapter = (leaves["A"], leaves["B"], leaves["folded"], groups, geometry)
    torch.manual_seed(5)
    if op == "pyramid_linear":
        weight = problem.weight
        truth = truth + exact["x"] @ weight.double().T
        actual = ept_kernels.pyramid_linear(leaves["x"], weight, None, *adapter, dropout_p=P)
    else:
        actual = ept_kernels.pyramid_delta(leaves["x"], *adapter, dropout_p=P)
    assert_matches(actual.detach(), truth.detach(), 1e-5)
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    actual.backward(grad)
    truth.backward(grad.double())
    for name in names:
        assert_matches(leaves[name].grad, exact[name].grad, 1e-5, name)


def test_checkpointing_replays_the_mask() -> None:
    problem = CASES["by sample"].tensors(torch.float32)
    x = problem.x.clone().requires_grad_()

    def layer(rows: torch.Tensor) -> torch.Tensor:
        return ept_kernels.pyramid_delta(
            rows, problem.A, problem.B, problem.folded, problem.groups, CASES["by sample"].geometry, dropout_p=P
        )

    torch.manual_seed(3)
    layer(x).sum().backward()
    plain, x.grad = x.grad, None
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, plain)


def test_masks_differ_from_call_to_call_and_drop_the_share_that_was_asked() -> None:
    geometry = PyramidGeometry(64, 64, 1, (1,))
    ones, A, B, folded = torch.ones(64, 64), torch.ones(1, 64), torch.ones(64, 1), torch.ones(1, 1)
    torch.manual_seed(0)
    first, second = (ept_kernels.pyramid_delta(ones, A, B, folded, None, geometry, dropout_p=P) for _ in range(2))
    assert not torch.equal(first, second)
    kept = first[:, 0] * (1 - P)  # a row's output counts the entries that were kept
    assert abs(kept.sum().item() / 64**2 - (1 - P)) < 5 * (P * (1 - P) / 64**2) ** 0.5


def test_a_compiled_call_draws_from_the_generator() -> None:
    case = CASES["by sample"]
    problem = case.tensors(torch.float32)

    def layer(rows: torch.Tensor) -> torch.Tensor:
        adapter = (problem.A, problem.B, problem.folded, problem.groups, case.geometry)
        return ept_kernels.pyramid_linear(rows, problem.weight, None, *adapter, dropout_p=P)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    expected = layer(problem.x)
    torch.manual_seed(4)
    assert torch.equal(compiled(problem.x), expected)
    assert not torch.equal(compiled(problem.x), expected)


@pytest.mark.parametrize("op", ["pyramid_delta", "pyramid_linear"])
def test_inductor_replays_the_mask_in_backward(op: str) -> None:
    """The default compiler may compute again in backward what forward drew; the layer is linear in x, so that
    ``<dx, x> = <dy, y>`` whatever the mask, if it is one and the same."""
    case = CASES["by sample"]
    problem = case.tensors(torch.float32)

    def layer(rows: torch.Tensor) -> torch.Tensor:
        base = (problem.weight, None) if op == "pyramid_linear" else ()
        adapter = (problem.A, problem.B, problem.folded, problem.groups, case.geometry)
        return getattr(ept_kernels, op)(rows, *base, *adapter, dropout_p=P)

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
