"""Targets whose weight somebody around them reads: refused by name, whatever model that is in."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import ept
from ept.readers import find_reader

from .conftest import awaken

WIDTH = 16


def _config(**options: Any) -> ept.EPTConfig:
    return ept.EPTConfig(**{"r": 2, "num_tasks": 2, "kernel_sizes": (2, 4), "target_modules": "all-linear", **options})


class Reader(nn.Module):
    """Has three linears, and reads the last one's weight as a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(WIDTH, WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rest[0](self.first(x)))

    def last(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rest[1].weight)


class InAnotherMethod(Reader):
    pass


class ThroughSuper(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class ByALocalName(Reader):
    def last(self, x: Tensor) -> Tensor:
        final = self.rest[1]
        weight = final.weight
        return x @ weight.T


class InALoop(Reader):
    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.rest[1:]):
            x = F.linear(x, layer.weight) + index
        return self.first(x)


class AllAtOnce(Reader):
    def last(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([layer.weight for layer in self.rest]))[..., :WIDTH]


def kernel(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


class ByAFunction(Reader):
    def last(self, x: Tensor) -> Tensor:
        return kernel(x, layer=self.rest[1])


class InTraining(Reader):
    def last(self, x: Tensor) -> Tensor:
        if self.training:
            return kernel(x, self.rest[1])
        return self.rest[1](x)


class OfAGrandchild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = NothingOfThat()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.rest[1].weight)


class NothingOfThat(Reader):
    """What many models do with weights that they do not compute with."""

    def last(self, x: Tensor) -> Tensor:
        layer = self.rest[1]
        if isinstance(layer.weight, Tensor) and layer.weight.dtype != x.dtype:
            x = x.to(self.rest[1].weight.dtype).to(layer.weight)
        if self.fused:
            return kernel(x, layer)
        return layer(x) if layer.weight is not None and layer.weight.shape[0] else x


READERS = [InAnotherMethod, ThroughSuper, ByALocalName, InALoop, AllAtOnce, ByAFunction, InTraining]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("targets", ["all-linear", ["1"]])
def test_readers_are_refused_by_name(kind: type[Reader], targets: object) -> None:
    model = nn.Sequential(kind(), nn.ReLU())
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"'0\.rest\.[01]' is read past: {kind.__name__} \(0\).*exclude_modules"):
        peft.get_peft_model(model, _config(target_modules=targets))
    assert dict(model.named_modules()) == before


def test_the_reader_may_be_further_out() -> None:
    assert find_reader(OfAGrandchild(), "inner.rest.1") == ("OfAGrandchild (the model)", True)
    assert find_reader(OfAGrandchild(), "inner.rest.0") is None


def test_excluding_what_is_read_helps() -> None:
    model = awaken(peft.get_peft_model(InAnotherMethod(), _config(exclude_modules=["rest.1"])))
    assert set(ept.adapters(model)) == {"first", "rest.0"}
    model(torch.randn(2, 3, WIDTH), task_ids=[0, 1]).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_settings_and_harmless_uses_refuse_nothing() -> None:
    model = peft.get_peft_model(NothingOfThat(), _config())
    assert len(ept.adapters(model)) == 3
    fused = NothingOfThat()
    fused.fused = True
    with pytest.raises(ValueError, match="is read past: NothingOfThat"):
        peft.get_peft_model(fused, _config())


def test_a_forward_that_was_patched_is_read() -> None:
    model = NothingOfThat()
    model.forward = ByAFunction.last.__get__(model)
    with pytest.raises(ValueError, match=r"'rest\.1' is read past: NothingOfThat"):
        peft.get_peft_model(model, _config())


class OnRequest(Reader):
    """Reads or calls, as an argument says: known only when it happens."""

    def forward(self, x: Tensor, fuse: bool = False) -> Tensor:
        if fuse:
            return F.linear(x, self.first.weight)
        return self.first(x)


def test_a_read_that_hangs_on_an_argument_is_refused_when_it_happens() -> None:
    model, x = awaken(peft.get_peft_model(OnRequest(), _config(target_modules=["first"]))), torch.randn(2, 3, WIDTH)
    expected = model(x, task_ids=[0, 1])
    with pytest.raises(ValueError, match=r"layer 'first' is read past: OnRequest \(the model\)"):
        model(x, task_ids=[0, 1], fuse=True)
    assert torch.equal(model(x, task_ids=[0, 1]), expected)
    with model.disable_adapter():
        assert torch.equal(model(x, fuse=True), F.linear(x, model.base_model.model.first.base_layer.weight))
    model.merge_adapter(task=1)
    merged = model(x, fuse=True) + model.base_model.model.first.base_layer.bias
    torch.testing.assert_close(merged, model(x))


MODELS = {
    "mamba": lambda: transformers.MambaModel(transformers.MambaConfig(hidden_size=WIDTH, num_hidden_layers=1)),
    "mamba2": lambda: transformers.Mamba2Model(
        transformers.Mamba2Config(hidden_size=WIDTH, num_heads=4, head_dim=8, n_groups=1, num_hidden_layers=1)
    ),
    "multi-head attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"]])
def test_known_kernels(name: str, targets: object) -> None:
    with pytest.raises(ValueError, match=r"out_proj' is read past|x_proj' is read past"):
        peft.get_peft_model(MODELS[name](), _config(target_modules=targets))


def test_models_that_only_could_read_are_accepted() -> None:
    bloom = transformers.BloomModel(transformers.BloomConfig(hidden_size=WIDTH, n_head=2, n_layer=1, vocab_size=32))
    assert len(ept.adapters(peft.get_peft_model(bloom, _config()))) == 4
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    deberta = transformers.DebertaModel(transformers.DebertaConfig(**sizes, vocab_size=32))
    model = peft.get_peft_model(deberta, _config(target_modules=["in_proj"])).eval()
    assert model(input_ids=torch.ones(2, 4, dtype=torch.long), task_ids=[0, 1]).last_hidden_state.isfinite().all()


def test_a_layer_by_hand_is_refused_where_it_would_not_be_called() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2)
    before = attention.out_proj
    layer = ept.EPTLinear.from_linear(nn.Linear(WIDTH, WIDTH), _config(target_modules=None))
    with pytest.raises(ValueError, match="'out_proj' of a MultiheadAttention cannot be a EPTLinear"):
        attention.out_proj = layer
    with pytest.raises(ValueError, match="'out_proj' of a MultiheadAttention cannot be a EPTLinear"):
        attention.add_module("out_proj", layer)
    assert attention.out_proj is before
    net = NothingOfThat()
    net.first = layer
    assert net.first is layer
