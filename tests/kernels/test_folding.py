"""Folding experts of one scale: values, gradients, refusals, and that the cost does not grow with the experts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyramid_testing import Recorder, assert_matches, examples, geometries

from ept import EPTConfig, EPTLinear
from ept_kernels import PyramidGeometry, fold_kernels, reference


@given(geometries(), st.integers(0, 4), st.integers(0, 100))
@examples(50)
def test_equals_the_definition_with_gradients(geometry: PyramidGeometry, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    kernels = [normal(k, k).requires_grad_() for k in geometry.kernel_sizes]
    gates = normal(groups, geometry.num_experts).requires_grad_()
    cotangent = normal(groups, geometry.folded_size)
    results = []
    for fold in (fold_kernels, reference.fold_kernels):
        folded = fold(kernels, gates, 0.3, geometry)
        results.append([folded, *torch.autograd.grad(folded, [gates, *kernels], cotangent)])
    for actual, expected in zip(*results, strict=True):
        assert_matches(actual, expected, 1e-14)


def test_alpha_over_r_alp_and_gates_are_inside() -> None:
    """By hand: two experts of scale 2, one of 4 with ALP factor 1/2."""
    g = PyramidGeometry(8, 8, 1, (2, 4, 2))
    kernels = [torch.full((2, 2), 1.0), torch.full((4, 4), 10.0), torch.full((2, 2), 100.0)]
    folded = fold_kernels(kernels, torch.tensor([[0.25, 0.5, 0.0], [0.0, 0.0, 2.0]]), 3.0, g)
    assert folded.tolist() == [[0.75] * 4 + [7.5] * 16, [600.0] * 4 + [0.0] * 16]


def test_keeps_the_precision_of_the_gates() -> None:
    g = PyramidGeometry(8, 8, 1, (2, 2))
    kernels = [torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    gates = torch.tensor([[1 / 3, 1 / 7]])
    folded = fold_kernels(kernels, gates, 1.0, g)
    assert folded.dtype == torch.float32
    torch.testing.assert_close(folded, gates.sum().expand(1, 4))


@pytest.mark.parametrize(
    ("sizes", "gates", "message"),
    [
        ((2, 4), (1, 3), r"kernels must have the sizes \(2, 4, 2\), got \(2, 4\)"),
        ((2, 2, 4), (1, 3), r"kernels must have the sizes \(2, 4, 2\), got \(2, 2, 4\)"),
        ((2, 4, 2), (1, 2), r"gates must be \[groups, 3 experts\], got \[1, 2\]"),
        ((2, 4, 2), (3,), r"gates must be \[groups, 3 experts\], got \[3\]"),
    ],
)
def test_refuses_what_does_not_fit(sizes: tuple[int, ...], gates: tuple[int, ...], message: str) -> None:
    g = PyramidGeometry(8, 8, 1, (2, 4, 2))
    with pytest.raises(ValueError, match=message):
        fold_kernels([torch.ones(k, k) for k in sizes], torch.ones(gates), 1.0, g)


@pytest.mark.parametrize("shapes", [((2, 4), (2, 2)), ((2, 1), (2, 3))])
def test_refuses_a_kernel_that_is_not_square(shapes: tuple[tuple[int, int], ...]) -> None:
    """The second case has the right number of elements in all."""
    g = PyramidGeometry(8, 8, 1, (2, 2))
    with pytest.raises(ValueError, match="kernels must"):
        fold_kernels([torch.ones(shape) for shape in shapes], torch.ones(1, 2), 1.0, g)


# --- the cost: what touches tensors as large as the activations -------------------------------------------------------

BATCH, TOKENS, WIDTH, EXPERTS, LARGEST = 8, 128, 48, 64, 5
#: Elements of a large tensor: beyond the kernels of a scale for every task of the batch, well below the activations.
LARGE = 2 * BATCH * EXPERTS // 4 * LARGEST**2


def large_operations(kernel_sizes: tuple[int, ...], task_ids: int | torch.Tensor) -> list[tuple[str, list[int]]]:
    """Operations on large tensors in one forward and backward pass of a layer."""
    torch.manual_seed(0)
    config = EPTConfig(r=4, kernel_sizes=kernel_sizes, top_k=2, num_tasks=BATCH, task_embedding_dim=4)
    layer = EPTLinear(WIDTH, WIDTH, config=config)
    for kernel in layer.kernels:
        torch.nn.init.normal_(kernel)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    assert x.numel() > 4 * LARGE
    with Recorder() as recorder:
        layer(x, task_ids).sum().backward()
    calls = recorder.large(LARGE)
    assert len(calls) > 10, "the recorder sees what runs inside the ops"
    return calls


@pytest.mark.usefixtures("torch_backend_forced")
@pytest.mark.parametrize("task_ids", [3, torch.arange(BATCH)], ids=["one task", "mixed tasks"])
def test_cost_does_not_grow_with_experts_of_the_same_scales(task_ids: int | torch.Tensor) -> None:
    few = large_operations((2, 2, 3, 3, 4, 4, 5, 5), task_ids)
    many = large_operations((2, 3, 4, 5) * (EXPERTS // 4), task_ids)
    assert few == many


@pytest.mark.usefixtures("torch_backend_forced")
def test_cost_does_not_grow_with_tasks_in_the_batch() -> None:
    one, mixed = large_operations((2, 2, 3, 3, 4, 4), 3), large_operations((2, 2, 3, 3, 4, 4), torch.arange(BATCH))
    assert Counter(name for name, _ in one) == Counter(name for name, _ in mixed)
    assert sum(sum(sizes) for _, sizes in one) == sum(sum(sizes) for _, sizes in mixed)


@pytest.mark.usefixtures("torch_backend_forced")
def test_cost_does_grow_with_scales() -> None:
    """The counter can tell: a pyramid of more scales takes more large operations."""
    assert len(large_operations((2, 3, 4), 0)) > len(large_operations((2, 2, 2), 0))
