"""Merging into weights that a layer does not have to itself: right, or refused by name with nothing changed."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ept

from .conftest import CASES, awaken


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _adapted(net: nn.Module, targets: list[str]) -> peft.PeftModel:
    config = ept.EPTConfig(r=2, num_tasks=2, kernel_sizes=(2, 4), target_modules=targets)
    return awaken(peft.get_peft_model(net, config)).eval()


def _layer(model: peft.PeftModel, name: str) -> ept.tuner.EPTLinearLayer:
    return model.base_model.model.get_submodule(name)


#: How a task may be merged, given a model and the name of the layer that cannot be.
MERGES: dict[str, Callable[[peft.PeftModel, str], object]] = {
    "merge": lambda model, name: _layer(model, name).merge(task=1),
    "merge_adapter": lambda model, name: model.merge_adapter(task=1),
    "merge_and_unload": lambda model, name: model.merge_and_unload(task=1),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_tied_head(merge: Callable) -> None:
    case = CASES["gpt2"]
    model = awaken(peft.get_peft_model(case.build(), case.config(target_modules=["lm_head", "c_fc"]))).eval()
    batch = case.batch()
    with torch.no_grad():
        expected = model(**batch, task_ids=1).logits
        with pytest.raises(ValueError, match=r"layer 'lm_head' shares its weight with 'transformer\.wte'"):
            merge(model, "lm_head")
        assert model.base_model.merged_task is None
        assert torch.equal(model(**batch, task_ids=1).logits, expected)


@pytest.mark.parametrize("targets", [["first"], ["first", "second"]], ids=["one adapted", "both adapted"])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_two_linears_with_one_weight(merge: Callable, targets: list[str]) -> None:
    net = Pair()
    net.second.weight = net.first.weight
    model, x = _adapted(net, targets), torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x, task_ids=1)
        with pytest.raises(ValueError, match="layer 'first' shares its weight with 'second"):
            merge(model, "first")
        assert torch.equal(model(x, task_ids=1), expected)


def test_a_weight_that_has_been_untied_merges() -> None:
    net = Pair()
    net.second.weight = net.first.weight
    model, x = _adapted(net, ["first"]), torch.randn(3, 16)
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())
    with torch.no_grad():
        expected = model(x, task_ids=1)
        model.merge_adapter(task=1)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("late", [False, True], ids=["before adapting", "after adapting"])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_base_weight_that_is_computed(merge: Callable, late: bool) -> None:
    net = Pair()
    if not late:
        parametrizations.weight_norm(net.first)
    model, x = _adapted(net, ["first", "second"]), torch.randn(3, 16)
    if late:
        parametrizations.weight_norm(_layer(model, "first").get_base_layer())
    with torch.no_grad():
        expected = model(x, task_ids=1)
        with pytest.raises(ValueError, match=r"layer 'first' .* computes its weight at every call"):
            merge(model, "first")
        assert model.base_model.merged_task is None
        assert torch.equal(model(x, task_ids=1), expected)
