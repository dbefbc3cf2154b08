"""Merging into weights that a layer does not have to itself: right, or refused by name with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from rows_models import ARCHITECTURES
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

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


class Scaled(nn.Module):
    """A parametrisation without an inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * x


#: What computes a layer's weight at every call.
COMPUTES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "parametrisation": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "hook of weight_norm": weight_norm,
    "hook of spectral_norm": spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}
computed = pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)


@computed
@pytest.mark.parametrize("late", [False, True], ids=["before adapting", "after adapting"])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_base_weight_that_is_computed(merge: Callable, late: bool, compute: Callable) -> None:
    net = Pair().eval()
    if not late:
        compute(net.first)
    model, x = _adapted(net, ["first", "second"]), torch.randn(3, 16)
    if late:
        compute(_layer(model, "first").get_base_layer())
    with torch.no_grad():
        expected = model(x, task_ids=1)
        with pytest.raises(ValueError, match=r"layer 'first' .* computes its weight at every call"):
            merge(model, "first")
        assert model.base_model.merged_task is None
        assert torch.equal(model(x, task_ids=1), expected)


@computed
def test_a_computed_weight_is_given_back_as_it_was(compute: Callable) -> None:
    net = Pair().eval()
    compute(net.first)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    _adapted(net, ["first", "second"]).unload()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def _classifier(compute: Callable, of: str) -> tuple[nn.Module, dict]:
    case = CASES["bert"]
    net = case.build().eval()
    compute(net.get_submodule(of))
    return net, case.batch()


@computed
def test_a_merged_model_is_not_written_with_a_weight_that_its_class_would_not_find(
    compute: Callable, tmp_path: Path
) -> None:
    net, batch = _classifier(compute, "bert.pooler.dense")
    config = CASES["bert"].config(target_modules=["query", "key"])
    model = awaken(peft.get_peft_model(net, config)).eval()
    with torch.no_grad():
        expected = model(**batch, task_ids=1).logits
        with pytest.raises(ValueError, match=r"module 'bert\.pooler\.dense' computes its weight at every call"):
            ept.export_merged(model, 1, tmp_path / "merged")
        assert not list(tmp_path.iterdir())
        ept.export_lora(model, 1, tmp_path / "lora")  # of the adapted layers alone
        torch.testing.assert_close(model.merge_and_unload(task=1)(**batch).logits, expected)


@computed
def test_a_computed_weight_that_is_saved_with_the_adapter(compute: Callable, tmp_path: Path) -> None:
    net, batch = _classifier(compute, "classifier")
    config = CASES["bert"].config(modules_to_save=["classifier"])
    if not net.classifier.weight.is_leaf and not parametrize.is_parametrized(net.classifier):
        before = list(net.named_modules())
        with pytest.raises(ValueError, match="modules_to_save: 'classifier' has a weight that a hook computes"):
            peft.get_peft_model(net, config)
        assert list(net.named_modules()) == before
        return
    model = awaken(peft.get_peft_model(net, config)).eval()
    expected = model(**batch, task_ids=1).logits.detach()
    with pytest.raises(ValueError, match=r"module 'classifier'.* computes its weight at every call"):
        ept.export_merged(model, 1, tmp_path / "merged")
    if parametrize.is_parametrized(net.classifier.original_module):
        with pytest.raises(ValueError, match=r"module 'classifier'.* computes its weight at every call"):
            ept.export_lora(model, 1, tmp_path / "lora")
        assert not list(tmp_path.iterdir())
    torch.testing.assert_close(model.merge_and_unload(task=1)(**batch).logits, expected)


def test_a_computed_weight_that_the_class_builds_itself_is_written(tmp_path: Path) -> None:
    """Wav2Vec2 norms the weight of its convolution over positions."""
    torch.manual_seed(0)
    net = ARCHITECTURES["Wav2Vec2"].make().eval()
    model = _adapted(net, ["q_proj"])
    batch = ARCHITECTURES["Wav2Vec2"].batch(6)
    with torch.no_grad():
        expected = model(**batch, task_ids=1).logits
        loaded = type(net).from_pretrained(ept.export_merged(model, 1, tmp_path / "merged")).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-4)
