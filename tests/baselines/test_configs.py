"""What the methods' configs refuse, by name."""

from __future__ import annotations

import pytest
from baselines_testing import CONFIGS

import ept


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"lora_alpha": 0}, "lora_alpha must be a number > 0, got 0"),
        ({"lora_dropout": 1}, r"lora_dropout must be a number in \[0, 1\), got 1"),
        ({"num_tasks": 0}, "num_tasks must be an integer >= 1, got 0"),
        ({"task_names": ["a", "a"], "num_tasks": 8}, "task_names must be distinct"),
    ],
)
def test_common_fields(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIGS[name](**options)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (ept.MoREConfig, {"temperature": 0}, "temperature must be a number > 0, got 0"),
        (ept.MoREConfig, {"contrastive_weight": -1}, "contrastive_weight must be a number >= 0, got -1"),
        (ept.MOELoRAConfig, {"r": 6, "num_experts": 4}, "r must be a multiple of num_experts=4"),
        (ept.MOELoRAConfig, {"num_experts": 0}, "num_experts must be an integer >= 1, got 0"),
        (ept.MOELoRAConfig, {"task_embedding_dim": 1.5}, "task_embedding_dim must be an integer >= 1, got 1.5"),
        (ept.MixLoRAConfig, {"top_k": 9}, "top_k must be an integer from 1 to num_experts=8, got 9"),
        (ept.MixLoRAConfig, {"num_experts": True}, "num_experts must be an integer >= 1, got True"),
        (ept.MixLoRAConfig, {"balance_weight": -0.1}, "balance_weight must be a number >= 0, got -0.1"),
        (ept.DCFTConfig, {"kernel_size": 0}, "kernel_size must be an integer >= 1, got 0"),
        (ept.DCFTConfig, {"orthogonality_weight": -1}, "orthogonality_weight must be a number >= 0, got -1"),
    ],
)
def test_own_fields(config: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_defaults_are_the_papers() -> None:
    moelora, mixlora, dcft = ept.MOELoRAConfig(), ept.MixLoRAConfig(), ept.DCFTConfig()
    assert (moelora.r, moelora.num_experts, moelora.task_embedding_dim) == (16, 8, 64)
    assert (mixlora.num_experts, mixlora.top_k, mixlora.balance_weight) == (8, 2, 0.01)
    assert (dcft.r, dcft.orthogonality_weight) == (1, 0.1)
