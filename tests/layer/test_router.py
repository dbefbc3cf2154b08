"""``route``: top-k, one softmax over the selected, straight-through for a single expert, fp32 always."""

from __future__ import annotations

import pytest
import torch

from ept.pyramid.router import route


def inputs(groups: int = 5, experts: int = 8, dim: int = 6, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(experts, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    embeddings = torch.randn(groups, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return gate, embeddings


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_selects_the_largest_logits_best_first(top_k: int) -> None:
    gate, embeddings = inputs()
    index, gates = route(gate, embeddings, top_k)
    assert index.shape == gates.shape == (5, top_k)
    assert index.dtype == torch.long
    logits = embeddings @ gate.T
    assert torch.equal(index, logits.sort(dim=1, descending=True).indices[:, :top_k])


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_one_softmax_over_the_selected_logits(top_k: int) -> None:
    """Each gate is exp(logit) over the sum of the selected exp: computed here once, without softmax."""
    gate, embeddings = inputs()
    _, gates = route(gate, embeddings, top_k)
    exponentials = (embeddings @ gate.T).exp()
    for g in range(len(gates)):
        best = sorted(exponentials[g].tolist(), reverse=True)[:top_k]
        assert gates[g].tolist() == pytest.approx([value / sum(best) for value in best], rel=1e-12)
    assert torch.allclose(gates.sum(1), torch.ones(5, dtype=torch.float64))


def test_top_2_weights_are_not_pinned() -> None:
    """The released code's second softmax keeps top-2 weights within [0.27, 0.73]."""
    gate = torch.tensor([[4.0], [0.0], [-9.0]])
    _, gates = route(gate, torch.ones(1, 1), 2)
    assert gates[0, 0] > 0.98


@pytest.mark.parametrize("top_k", [2, 3])
def test_gradient_of_the_selected_softmax(top_k: int) -> None:
    gate, embeddings = inputs()
    cotangent = torch.randn(5, top_k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index, gates = route(gate, embeddings, top_k)
    actual = torch.autograd.grad(gates, [gate, embeddings], cotangent)
    selected = (embeddings @ gate.T).gather(1, index)
    expected = torch.autograd.grad(selected.exp() / selected.exp().sum(1, keepdim=True), [gate, embeddings], cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_one_expert_straight_through() -> None:
    """Value exactly 1, gradient of the full softmax, not zero."""
    gate, embeddings = inputs(groups=50)
    cotangent = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index, gates = route(gate, embeddings, 1)
    assert torch.equal(gates, torch.ones(50, 1, dtype=torch.float64))
    actual = torch.autograd.grad(gates, [gate, embeddings], cotangent)
    exponentials = (embeddings @ gate.T).exp()
    probability = (exponentials / exponentials.sum(1, keepdim=True)).gather(1, index)
    expected = torch.autograd.grad(probability, [gate, embeddings], cotangent)
    for a, e in zip(actual, expected, strict=True):
        assert a.norm() > 0
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_never_below_fp32(dtype: torch.dtype) -> None:
    """Logits of half parameters are computed in fp32: rounded to bf16 these two would tie."""
    gate = torch.tensor([[1.0, 2**-10], [1.0, 0.0], [0.0, 0.0]], dtype=dtype)
    embeddings = torch.ones(1, 2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        index, gates = route(gate, embeddings, 2)
    assert gates.dtype == torch.float32
    assert index.tolist() == [[0, 1]]
    expected = torch.tensor([[1 + 2**-10, 1.0]]).softmax(1)
    torch.testing.assert_close(gates, expected, rtol=1e-6, atol=0)
    assert gates[0, 0] > gates[0, 1]


def test_float64_stays_float64() -> None:
    assert route(*inputs(), 2)[1].dtype == torch.float64


@pytest.mark.parametrize("top_k", [1, 2])
def test_autocast_changes_no_bit(top_k: int) -> None:
    gate, embeddings = inputs(dtype=torch.float32)
    index, gates = route(gate, embeddings, top_k)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_index, autocast_gates = route(gate, embeddings, top_k)
    assert torch.equal(index, autocast_index)
    assert torch.equal(gates, autocast_gates)


@pytest.mark.parametrize("top_k", [1, 3])
def test_no_groups(top_k: int) -> None:
    index, gates = route(inputs()[0], torch.zeros(0, 6, dtype=torch.float64), top_k)
    assert index.shape == gates.shape == (0, top_k)
