"""``torch.func``, ``torch.export`` and ONNX on adapted models: right, or refused by name."""

from __future__ import annotations

import io

import peft
import pytest
import torch
from baselines_testing import awaken_all
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ept

TARGETS = {"num_tasks": 3, "target_modules": ["first", "second"]}
CONFIGS = {
    "ept": lambda: ept.EPTConfig(r=2, kernel_sizes=(2, 4), **TARGETS),
    "more": lambda: ept.MoREConfig(r=4, **TARGETS),
    "moelora": lambda: ept.MOELoRAConfig(r=4, num_experts=2, **TARGETS),
    "dcft": lambda: ept.DCFTConfig(kernel_size=4, **TARGETS),
    "tucka": lambda: ept.TuckAConfig(**TARGETS),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class WithIds(nn.Module):
    """Takes the ids as a tensor beside x, as an exported program does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.model(x, task_ids=ids)


def _model(name: str) -> peft.PeftModel:
    torch.manual_seed(0)
    return awaken_all(peft.get_peft_model(Net(), CONFIGS[name]())).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_vmap_over_samples_of_one_task(name: str) -> None:
    model, x = _model(name), torch.randn(4, 5, 16)
    found = vmap(lambda sample: model(sample[None], task_ids=1)[0])(x)
    torch.testing.assert_close(found, model(x, task_ids=1))


@pytest.mark.parametrize("name", CONFIGS)
def test_vmap_over_ids_is_refused(name: str) -> None:
    model, x = _model(name), torch.randn(4, 5, 16)
    with pytest.raises(ValueError, match="task_ids is what vmap runs over"):
        vmap(lambda sample, task: model(sample[None], task_ids=task[None])[0])(x, torch.tensor([0, 1, 2, 1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_torch_func_are_refused_by_name(name: str) -> None:
    model, x = _model(name), torch.randn(4, 5, 16)
    parameters = {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,), {"task_ids": 1}).square().sum()

    with pytest.raises(RuntimeError, match=r"layer 'first' is differentiated by torch\.func"):
        grad(loss)(parameters, x)
    with pytest.raises(RuntimeError, match=r"layer 'first' is differentiated by torch\.func"):
        vmap(lambda parameters, sample: grad(loss)(parameters, sample[None]), in_dims=(None, 0))(parameters, x)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_export_with_any_batch(name: str, strict: bool) -> None:
    model, batch = WithIds(_model(name)).eval(), torch.export.Dim("batch", min=2, max=64)
    example = (torch.randn(4, 5, 16), torch.tensor([0, 1, 2, 1]))
    program = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch}), strict=strict).module()
    for size in (2, 4, 9):
        x, ids = torch.randn(size, 5, 16), torch.randint(3, (size,))
        torch.testing.assert_close(program(x, ids), model(x, ids))


def test_onnx_wants_a_merged_layer() -> None:
    config = ept.EPTConfig(r=2, num_tasks=3, kernel_sizes=(2, 4))
    layer = awaken_all(ept.EPTLinear(16, 8, config=config)).eval()
    example = (torch.randn(4, 16), torch.tensor([0, 1, 2, 1]))
    with pytest.raises(RuntimeError, match="this EPTLinear cannot be written as ONNX with its adapter: merge first"):
        torch.onnx.export(layer, example, io.BytesIO(), dynamo=False)
    with pytest.raises(RuntimeError, match="layer 'first' cannot be written as ONNX with its adapter: merge first"):
        torch.onnx.export(WithIds(_model("ept")), (torch.randn(4, 5, 16), example[1]), io.BytesIO(), dynamo=False)
