"""Bases that call ``torch.utils.checkpoint`` themselves: recomputed under the tasks of the pass they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from baselines_testing import awaken_all
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ept

IDS, OTHERS = [0, 1, 2, 0], [2, 2, 1, 1]


class Network(nn.Module):
    """A network whose middle is recomputed in one of several ways."""

    def __init__(self, around: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.around = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8), around

    def block(self, h: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.block(h) if self.around is None else self.around(self.block, h)


def nested(function: Callable[..., Tensor], h: Tensor) -> Tensor:
    return checkpoint(lambda rows: checkpoint(function, rows, use_reentrant=True), h, use_reentrant=True)


WAYS: dict[str, Callable[..., Tensor]] = {
    "reentrant": lambda function, h: checkpoint(function, h, use_reentrant=True),
    "not reentrant": lambda function, h: checkpoint(function, h, use_reentrant=False),
    "no early stop": lambda function, h: checkpoint(function, h, use_reentrant=False, early_stop=False),
    "nested": nested,
    "sequential": lambda function, h: checkpoint_sequential([nn.Identity(), function], 1, h, use_reentrant=False),
}


class Rerun(torch.autograd.Function):
    """Recomputation that is not torch's, as reversible networks have it."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], h: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(h)
        return function(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        h = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(h)
        output.backward(gradient)
        return None, h.grad


def _model(around: Callable[..., Tensor] | None) -> peft.PeftModel:
    torch.manual_seed(0)
    config = ept.EPTConfig(r=2, num_tasks=3, kernel_sizes=(2, 4), target_modules=["b", "c"])
    return awaken_all(peft.get_peft_model(Network(around), config)).train()


def _inputs() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def alone(model: nn.Module) -> None:
    model(_inputs(), task_ids=IDS).square().sum().backward()


def inside_another_block(model: nn.Module) -> None:
    loss = model(_inputs(), task_ids=IDS).square().sum()
    with ept.use_tasks(OTHERS):
        loss.backward()


def two_passes(model: nn.Module) -> None:
    losses = [model(_inputs(), task_ids=ids).square().sum() for ids in (IDS, OTHERS)]
    (losses[0] + 2 * losses[1]).backward()


def two_passes_inside_another_block(model: nn.Module) -> None:
    first = model(_inputs(), task_ids=IDS).square().sum()
    with ept.use_tasks(OTHERS):
        (first + 2 * model(_inputs()).square().sum()).backward()


def _gradients(model: nn.Module, run: Callable[[nn.Module], None]) -> Sequence[Tensor | None]:
    run(model)
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


RUNS = [alone, inside_another_block, two_passes, two_passes_inside_another_block]


@pytest.mark.parametrize("run", RUNS, ids=[run.__name__ for run in RUNS])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_a_pass_that_keeps_its_activations(way: str, run: Callable) -> None:
    expected = _gradients(_model(None), run)
    found = _gradients(_model(WAYS[way]), run)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_models_without_an_adapter_are_left_alone(way: str) -> None:
    torch.manual_seed(0)
    plain, own = Network(None), Network(WAYS[way])
    own.load_state_dict(plain.state_dict())
    for model in (plain, own):
        model(_inputs()).sum().backward()
    for parameter, other in zip(plain.parameters(), own.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_a_recomputation_that_is_not_torchs_does_not_take_other_tasks() -> None:
    model = _model(Rerun.apply)
    with pytest.raises(ValueError, match="task_ids is missing"):
        alone(model)
    with pytest.raises(ValueError, match=r"a backward pass runs layers again, and not by torch\.utils\.checkpoint"):
        inside_another_block(model)
