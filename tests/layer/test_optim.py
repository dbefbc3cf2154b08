"""``parameter_groups``: every trainable parameter in exactly one group, with the right rate and decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ept import EPTConfig, EPTLinear, TaskTable, parameter_groups
from ept.pyramid.optim import GATE_LR_RATIO, KERNEL_LR_RATIO


@pytest.fixture
def model() -> nn.Module:
    """A shared table, a layer with its own, a tied head, and a frozen stranger."""
    config = EPTConfig(r=2, kernel_sizes=(2, 3, 2), num_tasks=3, task_embedding_dim=6)
    model = nn.Module()
    model.table = TaskTable(3, 6)
    model.first = EPTLinear(8, 8, config=config, task_table=model.table)
    model.second = EPTLinear(8, 8, config=config, task_table=model.table)
    model.own = EPTLinear(8, 8, config=config)
    model.head = nn.Linear(8, 2)
    model.tied = nn.Linear(8, 2)
    model.tied.weight = model.head.weight
    model.frozen = nn.Linear(8, 2).requires_grad_(False)
    return model


def test_every_trainable_parameter_once(model: nn.Module) -> None:
    groups = parameter_groups(model, 1e-3)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_each_group_holds_what_it_names(model: nn.Module) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 1e-3)}
    layers = ("first", "second", "own")
    assert groups == {
        "kernels": {f"{layer}.kernels.{i}" for layer in layers for i in range(3)},
        "seed and task embeddings": {f"{layer}.{name}" for layer in layers for name in ("A", "B")}
        | {"table.weight", "own.task_embeddings.weight"},
        "gates of width 6": {"first.gate", "second.gate", "own.gate"},
        "other": {"head.weight", "head.bias", "tied.bias"},
    }


@pytest.mark.parametrize("ratio", [None, 1.0, 25.0])
def test_rates_and_decay(model: nn.Module, ratio: float | None) -> None:
    arguments = {} if ratio is None else {"kernel_lr_ratio": ratio}
    groups = {g["name"]: g for g in parameter_groups(model, 2e-3, weight_decay=0.01, **arguments)}
    assert groups["kernels"]["lr"] == pytest.approx(2e-3 * (KERNEL_LR_RATIO if ratio is None else ratio))
    assert groups["gates of width 6"]["lr"] == pytest.approx(2e-3 * GATE_LR_RATIO / 6)
    assert groups["seed and task embeddings"]["lr"] == groups["other"]["lr"] == 2e-3
    assert {g["weight_decay"] for name, g in groups.items() if name != "other"} == {0}
    assert groups["other"]["weight_decay"] == 0.01


def test_a_torch_optimizer_takes_them(model: nn.Module) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, weight_decay=0.1))
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) != parameter.requires_grad


def test_frozen_parameters_stay_out(model: nn.Module) -> None:
    model.first.kernels.requires_grad_(False)
    model.table.weight.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(model, 1e-3) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_no_empty_group() -> None:
    layer = EPTLinear(8, 8, config=EPTConfig(r=2, kernel_sizes=(2, 3), num_tasks=1))
    names = [group["name"] for group in parameter_groups(layer, 1e-3)]
    assert names == ["seed and task embeddings", "kernels", "gates of width 8"]
    assert [group["name"] for group in parameter_groups(nn.Linear(2, 2), 1e-3)] == ["other"]


@pytest.mark.parametrize("value", [0, -1e-3, math.nan])
def test_a_bad_rate_is_named(model: nn.Module, value: float) -> None:
    with pytest.raises(ValueError, match="lr must be > 0, got"):
        parameter_groups(model, value)
    with pytest.raises(ValueError, match="kernel_lr_ratio must be > 0, got"):
        parameter_groups(model, 1e-3, kernel_lr_ratio=value)
    with pytest.raises(ValueError, match="gate_lr_ratio must be > 0, got"):
        parameter_groups(model, 1e-3, gate_lr_ratio=value)


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ValueError, match="model has no trainable parameters"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
