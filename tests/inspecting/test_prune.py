"""Pruned adapters: smaller, and the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import ept
from ept.inspecting.cli import main
from ept.inspecting.prune import prune_experts
from ept.inspecting.summary import inspect_adapter
from ept.saved import AdapterError, read_adapter

from .conftest import base_model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alp_scaling": False},
        {"kernel_sizes": (2, 4, 8, 4, 8, 6)},  # the smallest scale often goes, and the seed shrinks with it
        {"kernel_sizes": (5, 7, 6, 8), "top_k": 1},  # no size divides: the smallest scale has to stay
        {"top_k": 6},  # nothing is dead
    ],
)
def test_outputs_stay_and_dead_experts_go(save: Callable, options: dict[str, object], tmp_path: Path) -> None:
    model, folder = save(**options)
    before = inspect_adapter(read_adapter(folder))
    done = prune_experts(folder, tmp_path / "pruned")
    pruned = PeftModel.from_pretrained(base_model(), tmp_path / "pruned").eval()
    tokens = torch.arange(18).reshape(2, 9)
    for task in range(3):
        with torch.no_grad():
            torch.testing.assert_close(
                pruned(input_ids=tokens, task_ids=task).logits, model(input_ids=tokens, task_ids=task).logits
            )
    for name, layer in ept.adapters(pruned).items():
        whole = ept.adapters(model)[name]
        for task in range(3):
            expected = whole.delta_weight(task)
            error = (layer.delta_weight(task) - expected).norm() / expected.norm()
            assert error < 1e-6, (name, task)
    numbers = [
        sum(tensor.numel() for tensor in load_file(path / "adapter_model.safetensors").values())
        for path in (folder, tmp_path / "pruned")
    ]
    assert done.parameters == tuple(numbers)
    after = inspect_adapter(read_adapter(tmp_path / "pruned"))
    left = sum(min(layer.labels) not in [layer.labels[p] for p in range(len(layer.labels)) if p not in layer.dead]
               for layer in after.layers)  # fmt: skip
    assert after.dead[0] == left, "only an expert of the smallest scale may be left without a task"
    assert done.experts == (before.dead[1], after.dead[1])
    assert before.dead[0] == 0 or numbers[1] < numbers[0]


def test_a_pruned_adapter_can_be_pruned_and_saved_again(save: Callable, tmp_path: Path) -> None:
    _, folder = save(kernel_sizes=(2, 4, 8, 4, 8, 6))
    prune_experts(folder, tmp_path / "once")
    again = prune_experts(tmp_path / "once", tmp_path / "twice")
    assert again.parameters[0] == again.parameters[1]
    model = PeftModel.from_pretrained(base_model(), tmp_path / "twice")
    model.save_pretrained(tmp_path / "third")
    first, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("once", "third"))
    assert set(first) == set(last)
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_refusals_are_named(save: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, lora = save(LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="is a LORA adapter; only EPT's experts can be pruned"):
        prune_experts(lora, tmp_path / "out")
    _, folder = save(target_modules=["q_proj"])
    with pytest.raises(SystemExit):
        main([str(folder), "--quiet", "--prune", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
    assert main([str(folder), "--quiet", "--prune", str(tmp_path / "new")]) == 0
    assert "experts" in capsys.readouterr().out
