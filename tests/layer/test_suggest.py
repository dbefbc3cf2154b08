"""A pyramid from gradients: finds structure that is there, keeps to its budget, leaves the model alone."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ept
from ept.config import Sizes
from ept.suggest import PYRAMIDS, _blocks, _caught, _spend
from ept_kernels import PyramidGeometry


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(96, 128), nn.Linear(96, 128)
        self.head = nn.Linear(128, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.head(self.loud(x) + 1e-3 * self.quiet(x))[:, 0]
        return {"y": y} if labels is None else {"y": y, "loss": F.mse_loss(y, labels)}


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    found = [torch.randn(8, 96) for _ in range(count)]
    return [{"x": x, "labels": x.sum(1), "task_ids": torch.arange(8) % 2} for x in found]


CONFIG = ept.EPTConfig(r=4, num_tasks=2, target_modules=["loud", "quiet"])


def cost(sizes: Sizes) -> int:
    return PyramidGeometry(96, 128, 4, sizes).num_parameters


def test_parameters_go_where_the_gradient_is_and_the_model_stays() -> None:
    model = Model()
    model.head.bias.requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    budget = cost(PYRAMIDS[1]) + cost(PYRAMIDS[2])
    found = ept.suggest_pyramid(model, batches(), CONFIG, budget=budget)
    config = ept.EPTConfig(kernel_sizes=found.kernel_sizes, kernel_pattern=found.kernel_pattern)
    sizes = {name: config.for_layer(name).kernel_sizes for name in ("loud", "quiet")}
    assert cost(sizes["loud"]) > cost(sizes["quiet"])
    assert found.parameters == sum(map(cost, sizes.values())) <= found.budget == budget
    assert set(found.gains) == set(sizes)
    assert set(found.gains["loud"]) == set(PYRAMIDS)
    for sizes, gain in found.gains["loud"].items():
        assert gain == pytest.approx(1000 * found.gains["quiet"][sizes], rel=1e-3)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    again = ept.suggest_pyramid(model, batches(), CONFIG, budget=budget)
    assert again == found, "the same batches give the same proposal"
    assert ept.suggest_pyramid(model, batches(), CONFIG).budget == 2 * cost(CONFIG.kernel_sizes)


@pytest.mark.parametrize("scale", [2, 3, 5])
def test_a_kronecker_product_is_caught_whole_at_its_own_scale(scale: int) -> None:
    torch.manual_seed(scale)
    seed = torch.randn(7, 2) @ torch.randn(2, 5)
    gradient = torch.kron(seed, torch.randn(scale, scale))
    assert _caught(gradient, gradient, scale, 2) == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert _caught(gradient, gradient, scale + 1, 2) < 0.9 * gradient.norm().item()
    assert _caught(gradient, -gradient, scale, 2) == pytest.approx(-gradient.norm().item(), rel=1e-5)


def test_blocks_are_those_of_the_kronecker_product() -> None:
    seed, kernel = torch.randn(3, 4), torch.randn(5, 5)
    product = torch.kron(seed, kernel)
    torch.testing.assert_close(_blocks(product, 5), torch.outer(seed.flatten(), kernel.flatten()))
    cropped = _blocks(product[:-2, :-1], 5)
    assert cropped.shape == (12, 25)
    assert cropped.square().sum() == pytest.approx(product[:-2, :-1].square().sum().item(), rel=1e-5)


def test_budget_goes_to_the_most_gain_a_parameter() -> None:
    small, large = (8,), (2,)
    costs = {name: {small: 10, large: 30} for name in "abc"}
    gains = {"a": {small: 0.0, large: 3.0}, "b": {small: 0.0, large: 5.0}, "c": {small: 0.0, large: -1.0}}
    assert _spend(30, costs, gains) == ({"a": small, "b": small, "c": small}, 30)
    assert _spend(69, costs, gains) == ({"a": small, "b": large, "c": small}, 50)
    assert _spend(999, costs, gains) == ({"a": large, "b": large, "c": small}, 70)


def test_refusals_are_named() -> None:
    with pytest.raises(ValueError, match=r"budget must be at least [\d,]+ .*got 7"):
        ept.suggest_pyramid(Model(), batches(), CONFIG, budget=7)
    with pytest.raises(ValueError, match=r"batches must hold each task at least twice; once only: \[0, 1\]"):
        ept.suggest_pyramid(Model(), batches(1), CONFIG)
    with pytest.raises(ValueError, match="task_ids holds an id out of range; allowed: 0 to 1, got"):
        ept.suggest_pyramid(Model(), [{**batch, "task_ids": batch["task_ids"] + 1} for batch in batches()], CONFIG)
    adapted = peft.get_peft_model(Model(), CONFIG)
    with pytest.raises(ValueError, match="model must be the base model alone, got one with an adapter"):
        ept.suggest_pyramid(adapted, batches(), CONFIG)
    with pytest.raises(ValueError, match="none at all"):
        ept.suggest_pyramid(Model(), [], CONFIG)
    with pytest.raises(TypeError, match="model gave no loss"):
        ept.suggest_pyramid(Model(), [{"x": torch.randn(2, 96)}], CONFIG)
    with pytest.raises(ValueError, match=r"pyramids: none of \[\(97,\)\] fits the layer 'loud'"):
        ept.suggest_pyramid(Model(), batches(), CONFIG, pyramids=[(97,)])
