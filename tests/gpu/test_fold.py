"""The fused router and fold on a GPU: values against float64, the same bits twice, launches, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from fold_testing import (
    FoldCase,
    LargeFoldCase,
    ManyGroupsFoldCase,
    SaturatedFoldCase,
    assert_matches_definition,
    assert_nan_shows,
    assert_ties_go_to_the_first,
    assert_unknown_tasks_show,
    assert_unselected_experts_are_not_read,
)
from gpu_testing import capture, launched
from pyramid_testing import assert_same_bits

from ept import EPTConfig, EPTLinear
from ept_kernels import fold_tasks

SMALL = {f"seed {seed}": lambda seed=seed: FoldCase(seed, device="cuda") for seed in range(8)}
SMALL |= {f"one expert, seed {seed}": lambda seed=seed: FoldCase(seed, 1, device="cuda") for seed in range(4)}
SMALL |= {f"large, top {top_k}": lambda top_k=top_k: LargeFoldCase(top_k, "cuda") for top_k in (1, 3, 33)}
SMALL |= {"many groups": lambda: ManyGroupsFoldCase("cuda")}
SMALL |= {f"saturated, top {top_k}": lambda top_k=top_k: SaturatedFoldCase(top_k, "cuda") for top_k in (1, 2)}


@pytest.fixture(autouse=True)
def triton_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "triton")


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_small_cases_match_the_definition(make) -> None:
    assert_matches_definition(make(), fold_tasks)


def test_ties_and_nan() -> None:
    assert_ties_go_to_the_first(fold_tasks, "cuda")
    for top_k in (1, 3):
        assert_nan_shows(FoldCase(7, top_k, device="cuda"), fold_tasks)


def test_experts_that_are_not_selected_and_tasks_that_do_not_exist() -> None:
    """Nothing is read for them; the context stays usable."""
    assert_unselected_experts_are_not_read(fold_tasks, "cuda")
    for task in (-1, 3):
        assert_unknown_tasks_show(task, fold_tasks, "cuda")
    assert_matches_definition(FoldCase(0, device="cuda"), fold_tasks)


def test_determinism() -> None:
    case = LargeFoldCase(3, "cuda")
    first = case.results(fold_tasks)
    for _ in range(5):
        for name, value in case.results(fold_tasks).items():
            assert_same_bits(value.cpu(), first[name].cpu(), name)


def test_captures_in_a_cuda_graph() -> None:
    """Forward and backward replayed on other embeddings and tasks; a read of a value would end the capture."""
    case = LargeFoldCase(2, "cuda")
    leaves = [parameter.clone().requires_grad_() for parameter in case.parameters]

    def step() -> tuple[torch.Tensor, ...]:
        folded, active = case.fold(fold_tasks, leaves)
        return (folded.detach(), active, *torch.autograd.grad(folded, leaves, case.cotangent))

    graph, captured = capture(step)
    with torch.no_grad():
        leaves[1].copy_(torch.randn_like(leaves[1]))
        case.tasks.copy_(case.tasks.flip(0))
    graph.replay()
    for value, expected in zip(captured, step(), strict=True):
        assert_same_bits(value.cpu(), expected.cpu())


def test_launches_of_an_eager_layer() -> None:
    """Parameters packed, routed and folded, the small kernels and products; two launches more than the ops' back."""
    layer = EPTLinear(768, 768, config=EPTConfig(num_tasks=4), device="cuda")
    x = torch.randn(4, 96, 768, device="cuda")
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    outputs = []
    for _ in range(2):  # the first call compiles
        forward = launched(lambda: outputs.append(layer(x, 2)))
        backward = launched(lambda: torch.autograd.grad(outputs[-1].sum(), trained))
    assert len(forward) <= 2 + 2 + 3 * 2, forward  # a product may take two
    assert len(backward) <= 2 + 2 + 4 + 5 * 2, backward  # and so the sum and its gradient
