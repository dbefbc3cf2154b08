"""Classes that derive from ``nn.Linear`` and map no row to a row: refused by name, passed over by "all-linear"."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from rows_models import ARCHITECTURES
from torch import Tensor, nn

import ept

from .conftest import awaken

WIDTH = 16


def _config(**options: Any) -> ept.EPTConfig:
    return ept.EPTConfig(**{"r": 2, "num_tasks": 2, "kernel_sizes": (2, 4), "target_modules": "all-linear", **options})


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class Grouped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(4, -1, WIDTH).transpose(1, 2)
        return torch.bmm(x.reshape(-1, 4, WIDTH).transpose(0, 1), weight).transpose(0, 1).flatten(-2)


class Wider(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, 2))


class WithAnArgument(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class Clamped(nn.Linear):
    """A map of rows as others are, which counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x.clamp(-1, 1))


class Net(nn.Module):
    def __init__(self, special: nn.Module) -> None:
        super().__init__()
        self.plain, self.special = nn.Linear(WIDTH, WIDTH), special

    def forward(self, x: Tensor) -> Tensor:
        found = self.special(self.plain(x))
        return found if isinstance(found, Tensor) else found[0]


REFUSED = {
    Router: "it returns a tuple",
    Grouped: r"it fails for an input of \[1, 1, 16\]",
    Wider: r"it returns \[1, 1, 18\] for an input of \[1, 1, 16\]",
    WithAnArgument: "it fails for an input of .*scale",
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("targets", [["plain", "special"], "plain|special"])
def test_what_maps_no_row_to_a_row_is_refused_by_name(kind: type[nn.Linear], targets: Any) -> None:
    net = Net(kind(WIDTH, WIDTH))
    before = list(net.named_modules())
    message = f"target module 'special': {kind.__name__} is no linear map of its input: {REFUSED[kind]}"
    with pytest.raises(TypeError, match=message):
        peft.get_peft_model(net, _config(target_modules=targets))
    assert list(net.named_modules()) == before


@pytest.mark.parametrize("kind", REFUSED)
def test_all_linear_passes_over_it(kind: type[nn.Linear]) -> None:
    model = peft.get_peft_model(Net(kind(WIDTH, WIDTH)), _config())
    assert set(ept.adapters(model)) == {"plain"}
    model.add_adapter("second", _config())
    assert set(model.base_model.adapters("second")) == {"plain"}


@pytest.mark.parametrize("targets", ["all-linear", ["special"]])
def test_a_map_of_another_class_is_adapted_and_not_changed_by_the_trial(targets: Any) -> None:
    net = Net(Clamped(WIDTH, WIDTH)).train()
    model = awaken(peft.get_peft_model(net, _config(target_modules=targets)))
    assert "special" in ept.adapters(model)
    base = model.base_model.model.special.get_base_layer()
    assert base.calls == 0 and base.training
    x = 3 * torch.randn(2, 5, WIDTH)
    model(x, task_ids=[0, 1]).sum().backward()
    assert base.calls == 1


def test_a_layer_of_ones_own_does_not_drop_another_forward() -> None:
    for kind in (Router, Clamped):
        with pytest.raises(ValueError, match=rf"linear \({kind.__name__}\) has a forward pass of its own"):
            ept.EPTLinear.from_linear(kind(WIDTH, WIDTH), _config(target_modules=None))


def test_the_router_of_phimoe() -> None:
    config = transformers.PhimoeConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    net = transformers.PhimoeForCausalLM(config)
    with pytest.raises(TypeError, match=r"router': PhimoeTopKRouter is no linear map of its input: it returns a tuple"):
        peft.get_peft_model(net, _config(target_modules=["router"]))
    model = awaken(peft.get_peft_model(net, _config(kernel_sizes=(1, 2)))).eval()
    assert {name.rpartition(".")[2] for name in ept.adapters(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    batch = ARCHITECTURES["Llama"].batch(6)
    rows = zip(batch["input_ids"], [1, 0, 1], strict=True)
    alone = [model(input_ids=ids[None], task_ids=task).logits for ids, task in rows]
    torch.testing.assert_close(model(**batch, task_ids=[1, 0, 1]).logits, torch.cat(alone), atol=1e-5, rtol=1e-4)
