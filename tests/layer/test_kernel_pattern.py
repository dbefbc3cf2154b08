"""Layers of one model with pyramids of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ept import EPTConfig, adapters, parameter_breakdown, routing
from ept.config import shared_and_pattern

PATTERN = {"^first": (3, 5, 5), r"block\.\d+\.second": [2, 2, 4, 6]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(11, 13)
        self.block = nn.ModuleList(nn.ModuleDict({"first": nn.Linear(13, 9), "second": nn.Linear(9, 13)}) for _ in "ab")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.block:
            x = block["second"](block["first"](x))
        return x


def config() -> EPTConfig:
    return EPTConfig(r=2, kernel_sizes=(2, 7), kernel_pattern=PATTERN, num_tasks=3, target_modules=["first", "second"])


def test_layers_get_the_pyramid_of_the_first_pattern_that_matches() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Model(), config())
    sizes = {name: adapter.geometry.kernel_sizes for name, adapter in adapters(model).items()}
    assert sizes == {
        "first": (3, 5, 5),
        "block.0.first": (2, 7),
        "block.1.first": (2, 7),
        "block.0.second": (2, 2, 4, 6),
        "block.1.second": (2, 2, 4, 6),
    }
    assert all(adapter.expert_labels == sizes[name] for name, adapter in adapters(model).items())
    assert parameter_breakdown(model)["kernels"] == 59 + 2 * 53 + 2 * 60
    assert {name: index.max() < len(sizes[name]) for name, (index, _) in routing(model).items()}


def test_update_and_checkpoint_of_such_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Model(), config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ept_" in name:
                parameter.normal_()
    x = torch.randn(4, 11)
    expected = model(x, task_ids=[0, 2, 1, 1])
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Model(), tmp_path).eval()
    assert torch.equal(again(x, task_ids=[0, 2, 1, 1]), expected)
    assert again.peft_config["default"].kernel_pattern == {key: tuple(sizes) for key, sizes in PATTERN.items()}
    merged = again.merge_and_unload(task=2)
    torch.testing.assert_close(merged(x)[1], expected[1], rtol=1e-4, atol=1e-4)


def test_a_scale_larger_than_its_layer_names_the_layer() -> None:
    options = {"kernel_sizes": (2, 2), "num_tasks": 2, "target_modules": ["first", "second"]}
    with pytest.raises(ValueError, match=r"'block\.1\.second': kernel_sizes holds the scale 10"):
        get_peft_model(Model(), EPTConfig(kernel_pattern={r"1\.second": (2, 10)}, **options))


def test_sizes_by_layer_become_sizes_and_a_pattern_that_says_the_same() -> None:
    sizes = {"a.q": (2, 4), "b.a.q": (3,), "b.a_q": (2, 4), "c": (3, 3)}
    shared, pattern = shared_and_pattern(sizes)
    config = EPTConfig(kernel_sizes=shared, kernel_pattern=pattern, top_k=1)
    assert {name: config.for_layer(name).kernel_sizes for name in sizes} == sizes
    assert shared_and_pattern({"a": (2,), "b": (2,)}) == ((2,), None)
