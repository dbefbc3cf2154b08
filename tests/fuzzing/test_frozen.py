"""Gradients of frozen tensors are never allocated, and no backward pass keeps anything of a weight's size."""

from __future__ import annotations

import pytest
import torch
from pyramid_testing import Recorder
from torch import nn

from .saved import CONFIGS, make
from .support import LAYERS


@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_trains_has_a_gradient(name: str) -> None:
    model = make(name).train()
    (
        model(torch.randn(3, 12), task_ids=torch.tensor([0, 3 if name == "added task" else 1, 2])).square().sum()
    ).backward()
    trained = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all(model.get_parameter(key).requires_grad for key in trained)
    for key, parameter in model.named_parameters():
        if "base_layer" in key or "original_module" in key:
            assert parameter.grad is None, f"{key} is frozen and has a gradient"


@pytest.mark.parametrize("layer_class", LAYERS, ids=lambda kind: kind.__name__)
def test_no_step_allocates_what_is_as_large_as_a_weight(layer_class: type) -> None:
    """A layer far larger than its batch: whatever has its size is an update or a gradient ``[out, in]`` made dense."""
    width, rows = 160, 4
    layer = layer_class.from_linear(nn.Linear(width, width), LAYERS[layer_class])
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(rows, width, requires_grad=True)
    layer(x, torch.tensor([0, 1, 2, 0])).sum().backward()  # what is decided once is decided (TuckA's centroids)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with Recorder() as recorder:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = layer(x, torch.tensor([0, 1, 2, 0])).sum()
        loss.backward()
    assert kept and recorder.created
    base = layer.weight.untyped_storage().data_ptr()
    for what, tensors in (("kept for backward", kept), ("allocated", recorder.created)):
        large = [
            list(tensor.shape)
            for tensor in tensors
            if tensor.untyped_storage().data_ptr() != base and _is_dense(tensor, width)
        ]
        assert not large, f"{what}: {large}"


def _is_dense(tensor: torch.Tensor, width: int) -> bool:
    return tensor.untyped_storage().nbytes() >= width * width * 4
