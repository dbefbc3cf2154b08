"""The native router and fold against plain float64 operations: values, gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from fold_testing import (
    FoldCase,
    assert_matches_definition,
    assert_nan_shows,
    assert_only_what_is_asked_for,
    assert_ties_go_to_the_first,
)
from torch import Tensor

from ept_kernels import PyramidGeometry, fold_tasks
from ept_kernels.backends import cpu as cpu_backend

missing = cpu_backend.unsupported(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"no native CPU backend: {missing}")


@pytest.mark.parametrize("seed", range(60))
def test_it_matches_the_definition(seed: int) -> None:
    assert_matches_definition(FoldCase(seed), fold_tasks)


@pytest.mark.parametrize("seed", range(20))
def test_one_expert_passes_its_gradient_straight_through(seed: int) -> None:
    assert_matches_definition(FoldCase(seed, top_k=1), fold_tasks)


def test_without_gradients_the_values_are_the_same() -> None:
    case = FoldCase(3)
    with torch.no_grad():
        folded, active = case.fold(fold_tasks)
    expected = case.results(fold_tasks)
    assert torch.equal(folded, expected["folded"])
    assert torch.equal(active, expected["active"])
    assert not folded.requires_grad


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["gate", "table", "kernel"])
def test_only_the_gradients_asked_for(wanted: int) -> None:
    assert_only_what_is_asked_for(FoldCase(5), fold_tasks, wanted)


def test_ties_go_to_the_first_expert() -> None:
    assert_ties_go_to_the_first(fold_tasks)


def test_nan_shows() -> None:
    assert_nan_shows(FoldCase(7), fold_tasks)


@pytest.mark.parametrize("tasks", [-1, 3, torch.tensor([0, 3])])
def test_a_task_that_the_table_lacks_is_refused(tasks: int | Tensor) -> None:
    geometry = PyramidGeometry(16, 16, 2, (2,))
    with pytest.raises(IndexError, match=r"task_ids holds (-1|3); allowed: 0 to 2"):
        fold_tasks(torch.ones(1, 5), torch.ones(3, 5), tasks, [torch.ones(2, 2)], 1, 1.0, geometry)


def test_a_second_derivative_is_refused() -> None:
    case = FoldCase(5)
    leaves = [p.clone().requires_grad_() for p in case.parameters]
    folded, _ = case.fold(fold_tasks, leaves)
    (gradient,) = torch.autograd.grad(folded.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtypes_and_devices_are_not_its_own(dtype: torch.dtype) -> None:
    """transformers sets a default dtype while it loads a model, accelerate a default device."""
    case = FoldCase(3)
    expected = case.results(fold_tasks)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            results = case.results(fold_tasks)
    finally:
        torch.set_default_dtype(before)
    for name, value in results.items():
        assert value.device.type == "cpu"
        assert torch.equal(value, expected[name]), name


def test_batched_gradients_are_refused_by_name() -> None:
    case = FoldCase(3)
    leaves = [p.clone().requires_grad_() for p in case.parameters]
    folded, _ = case.fold(fold_tasks, leaves)
    with pytest.raises(RuntimeError, match="cannot be batched"):
        torch.autograd.grad(folded, leaves[0], torch.stack([case.cotangent] * 2), is_grads_batched=True)
