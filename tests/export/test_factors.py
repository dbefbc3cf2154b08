"""LoRA factors against the dense update of each method, and truncation against a dense singular value decomposition."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from pyramid_testing import assert_matches, examples, from_seed, shake

import ept
from ept.export.lora import lora_factors, truncate

SIZES = [(24, 24), (13, 29), (31, 11), (8, 8)]


@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 4, 4, 6, 6, 8, 8), (3,), (1, 5, 7), (8, 2, 8)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_pyramid_factors_are_exact(in_features: int, out_features: int, kernel_sizes: tuple, top_k: int) -> None:
    top_k = min(top_k, len(kernel_sizes))
    config = ept.EPTConfig(r=3, kernel_sizes=kernel_sizes, top_k=top_k, num_tasks=4, task_embedding_dim=5)
    layer = shake(ept.EPTLinear(in_features, out_features, config=config).double())
    for task in range(4):
        A, B = lora_factors(layer, task)
        chosen = layer.route(task)[0][0].tolist()
        assert len(A) == B.shape[1] == 3 * sum({kernel_sizes[expert] for expert in chosen})
        assert_matches(B @ A, layer.delta_weight(task), 1e-12)


def test_a_scale_that_does_nothing_takes_no_rank() -> None:
    layer = ept.EPTLinear(16, 16, config=ept.EPTConfig(r=2, num_tasks=1))
    A, B = lora_factors(layer, 0)
    assert A.shape == (0, 16) and B.shape == (16, 0), "kernels are zero at the start"


@pytest.mark.parametrize(
    ("layer", "most"),
    [
        (ept.MoRELinear(10, 14, config=ept.MoREConfig(r=5, num_tasks=3)), 5),
        (ept.MOELoRALinear(10, 14, config=ept.MOELoRAConfig(r=6, num_experts=3, num_tasks=3)), 6),
        (ept.DCFTLinear(10, 14, config=ept.DCFTConfig(kernel_size=3, num_tasks=3)), 3),
    ],
    ids=["more", "moelora", "dcft"],
)
def test_baselines_have_factors_too(layer: torch.nn.Module, most: int) -> None:
    layer = shake(layer.double())
    for task in range(3):
        A, B = lora_factors(layer, task)
        assert len(A) <= most
        assert_matches(B @ A, layer.delta_weight(task), 1e-12)
    if isinstance(layer, ept.MoRELinear):
        assert [len(lora_factors(layer, task)[0]) for task in range(3)] == (
            layer.route([0, 1, 2])[0][:, 0] + 1
        ).tolist()


def _factors(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rng.randrange(2**31))
    width, height, rank = (rng.randint(1, 20) for _ in range(3))
    return torch.randn(rank, width, dtype=torch.float64), torch.randn(height, rank, dtype=torch.float64)


@given(from_seed(lambda rng: (*_factors(rng), rng.randint(1, 22))))
@examples(60)
def test_truncation_is_the_best_of_its_rank(drawn: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    A, B, rank = drawn
    dense = B @ A
    singular = torch.linalg.svdvals(dense)
    cut_A, cut_B, norm, missing = truncate(A, B, rank)
    assert len(cut_A) == cut_B.shape[1] <= rank
    assert norm == pytest.approx(dense.norm().item(), rel=1e-9)
    assert missing == pytest.approx(singular[rank:].norm().item(), rel=1e-6, abs=1e-9)
    assert (dense - cut_B @ cut_A).norm().item() == pytest.approx(missing, rel=1e-6, abs=1e-9)


def test_exact_factors_are_not_touched() -> None:
    A, B = torch.randn(4, 9), torch.randn(7, 4)
    for rank in (None, 4, 9):
        same_A, same_B, norm, missing = truncate(A, B, rank)
        assert same_A is A and same_B is B and missing == 0.0
        assert norm == pytest.approx((B @ A).norm().item(), rel=1e-5)
