"""Large inputs, embeddings and temperatures in every dtype: finite, and what float64 says."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ept
from ept.pyramid.router import route
from ept.task_table import TaskTable, contrastive_task_loss

from .support import COUNTED, LAYERS, many

_EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("routing", ["task", "token"])
@pytest.mark.parametrize("dtype", _EPSILON, ids=str)
@pytest.mark.parametrize("layer_class", LAYERS, ids=lambda kind: kind.__name__)
def test_inputs_of_ten_thousand(layer_class: type, dtype: torch.dtype, routing: str) -> None:
    config = copy.copy(LAYERS[layer_class])
    if routing == "token":
        if layer_class is not ept.EPTLinear:
            return  # the others have no such option
        config = ept.EPTConfig(r=2, kernel_sizes=(2, 3, 5), num_tasks=3, routing="token")
    torch.manual_seed(0)
    layer = layer_class.from_linear(nn.Linear(32, 24, dtype=dtype), config)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    x = (1e4 * torch.randn(3, 2, 32).clamp(-1, 1)).to(dtype)
    tasks = torch.tensor([0, 1, 2])
    layer(x, tasks)  # TuckA's centroids come from the first batch
    wide = copy.deepcopy(layer).double()
    output, exact = layer(x, tasks), wide(x.double(), tasks)
    assert output.dtype == dtype and output.isfinite().all()
    assert (output.double() - exact).norm() <= 8 * _EPSILON[dtype] * exact.norm()
    output.float().mean().backward()
    exact.mean().backward()
    for (name, parameter), (_, truth) in zip(layer.named_parameters(), wide.named_parameters(), strict=True):
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            assert truth.grad is not None, name
    COUNTED["layers at 1e4"][str(dtype)] += 1


@pytest.mark.parametrize("top_k", [1, 2])
def test_gates_of_huge_logits(top_k: int) -> None:
    @many(50)
    @given(st.integers(0, 2**31), st.floats(-8, 15))
    def run(seed: int, magnitude: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        gate = (10**magnitude * torch.randn(5, 8, generator=generator)).requires_grad_()
        embeddings = 10 ** min(magnitude, 10) * torch.randn(3, 8, generator=generator)
        index, gates = route(gate, embeddings, top_k)
        exact_index, exact = route(gate.double(), embeddings.double(), top_k)
        assert gates.isfinite().all() and torch.equal(index, exact_index)
        torch.testing.assert_close(gates, exact.float(), rtol=1e-3, atol=1e-3)
        (gradient,) = torch.autograd.grad(gates.square().sum(), gate)
        assert gradient.isfinite().all()
        COUNTED["gates"]["served"] += 1

    run()


@pytest.mark.parametrize("temperature", [1e-6, 0.05, 1e6])
def test_the_contrastive_loss_of_huge_embeddings(temperature: float) -> None:
    @many(60)
    @given(
        st.integers(0, 2**31), st.floats(-30, 37), st.floats(-30, 37), st.sampled_from([torch.float32, torch.bfloat16])
    )
    def run(seed: int, table_magnitude: float, pooled_magnitude: float, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        table = TaskTable(4, 8)
        with torch.no_grad():
            table.weight.normal_().clamp_(-3, 3).mul_(10**table_magnitude)
        pooled = [(10**pooled_magnitude * torch.randn(5, 8).clamp(-3, 3)).to(dtype)]
        tasks = torch.randint(4, (5,))
        loss = contrastive_task_loss(pooled, tasks, table, temperature)
        (gradient,) = torch.autograd.grad(loss, table.weight)
        exact = contrastive_task_loss(
            [rows.double() for rows in pooled], tasks, copy.deepcopy(table).double(), temperature
        )
        assert loss.isfinite() and gradient.isfinite().all()
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5 + 1e-6 / temperature)
        COUNTED["contrastive losses"]["served"] += 1

    run()
