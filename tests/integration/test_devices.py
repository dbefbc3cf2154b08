"""A base on two devices, as ``device_map`` spreads it: what layers share goes to each layer's device.

No test machine has two. The meta device stands for the second: it computes no numbers, but refuses mixed devices alike.
It gives nothing back either, so the losses are judged by fake tensors, which have a device and no storage.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ept
from ept.baselines.dcft import DCFTAdapter
from ept.baselines.mixlora import MixLoRAAdapter
from ept.context import TaskContext
from ept.task_table import TaskTable, contrastive_task_loss

WIDTH = 16


class Block(nn.Module):
    """A feed-forward network."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 24, device=device)
        self.down_proj = nn.Linear(24, WIDTH, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class Spread(nn.Module):
    """Two blocks on two devices; what accelerate's hooks do between them is done in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block("cpu"), Block("meta")])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layers[1](self.layers[0](x).to("meta"))


TARGETS: dict[str, Any] = {"target_modules": ["up_proj", "down_proj"], "num_tasks": 3}
CONFIGS = {
    "ept": ept.EPTConfig(r=2, kernel_sizes=(2, 4), **TARGETS),
    "ept, top 1": ept.EPTConfig(r=2, kernel_sizes=(2, 4), top_k=1, **TARGETS),
    "ept, tokens route": ept.EPTConfig(r=2, kernel_sizes=(2, 4), routing="token", **TARGETS),
    "more": ept.MoREConfig(r=4, **TARGETS),
    "moelora": ept.MOELoRAConfig(r=4, num_experts=2, **TARGETS),
    "dcft": ept.DCFTConfig(kernel_size=4, **TARGETS),
    "mixlora": ept.MixLoRAConfig(r=2, num_experts=2, **TARGETS),
    "tucka": ept.TuckAConfig(r=2, **TARGETS),
}
TASKS = {"one task": 1, "mixed": [0, 2], "more samples than tasks": [0, 1, 2, 1]}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("tasks", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_on_two_devices(
    name: str, tasks: int | list[int], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPT_BACKEND", "torch")  # the others serve no meta device
    samples = 2 if isinstance(tasks, int) else len(tasks)
    model = peft.get_peft_model(Spread(), CONFIGS[name]).train(training)
    mask = torch.ones(samples, 5, dtype=torch.long)
    output = model(torch.randn(samples, 5, WIDTH), attention_mask=mask, task_ids=tasks)
    assert output.is_meta and output.shape == (samples, 5, WIDTH)
    devices = {p.device.type for layer in ept.adapters(model).values() for p in layer.parameters()}
    assert devices == {"cpu", "meta"}


def test_a_mixture_reaches_both_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "torch")
    model = peft.get_peft_model(Spread(), CONFIGS["ept"]).eval()
    mixture = ept.TaskMixture(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    assert model(torch.randn(2, 5, WIDTH), task_ids=mixture).is_meta


def test_losses_gather_what_layers_on_two_devices_left() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        table, here, there = TaskTable(3, WIDTH), torch.empty(2, WIDTH), torch.empty(2, WIDTH, device="cuda")
        loss = contrastive_task_loss([here, there], torch.tensor([0, 2]), table, 0.05)
        assert loss.device == table.weight.device
        context = TaskContext(None, terms=[torch.empty(2, 3), torch.empty(2, 3, device="cuda")])
        config = CONFIGS["mixlora"]
        shared = ept.baselines.mixlora_router.TokenRouters(3, None, {}, {}, 3, 2)
        _, balance = MixLoRAAdapter.losses(config, shared, {}, context)["load_balance_loss"]
        assert balance.device.type == "cpu"
        adapters = {}
        for device in ("cpu", "cuda"):
            adapter = adapters[device] = DCFTAdapter(WIDTH, WIDTH, CONFIGS["dcft"], shared)
            for key in "AB":
                setattr(adapter, key, nn.Parameter(torch.empty_like(getattr(adapter, key), device=device)))
        _, orthogonality = DCFTAdapter.losses(CONFIGS["dcft"], shared, adapters, None)["orthogonality_loss"]
        assert orthogonality.device.type == "cpu"
