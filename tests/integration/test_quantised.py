"""Bases with quantised weights: forward, backward, no silent merge, and exports that need no quantised library.

The tests of a library that is not installed are skipped, each with that reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from export_testing import without_ept
from pyramid_testing import assert_matches, relative_error
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ept
from ept.tuner.quantised import dequantised, has_dense_weight, is_quantised, is_repacked

from .conftest import CASES, awaken

SIZES = [(64, 128), (128, 64)]
_EXTRA = "is not installed: pip install 'ept-kernels[quantised]'"


def _bitsandbytes(layer_class: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    library = pytest.importorskip("bitsandbytes", reason=f"bitsandbytes {_EXTRA}")

    def quantise(linear: nn.Linear) -> nn.Module:
        layer = getattr(library.nn, layer_class)(linear.in_features, linear.out_features, **options)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return quantise


def _int8() -> Callable[[nn.Linear], nn.Module]:
    return _bitsandbytes("Linear8bitLt", has_fp16_weights=False)


def _nf4() -> Callable[[nn.Linear], nn.Module]:
    return _bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="nf4")


def _torchao() -> Callable[[nn.Linear], nn.Module]:
    library = pytest.importorskip("torchao.quantization", reason=f"torchao {_EXTRA}")

    def quantise(linear: nn.Linear) -> nn.Module:
        library.quantize_(linear, library.Int8WeightOnlyConfig())
        return linear

    return quantise


LIBRARIES = {"bnb-int8": _int8, "bnb-nf4": _nf4, "torchao-int8": _torchao}


@pytest.fixture(params=LIBRARIES)
def quantise(request: pytest.FixtureRequest) -> Callable[[nn.Linear], nn.Module]:
    torch.manual_seed(5)
    return LIBRARIES[request.param]()


def _adapted(quantise: Callable[[nn.Linear], nn.Module]) -> peft.PeftModel:
    net = nn.Sequential(*(quantise(nn.Linear(*size)) for size in SIZES))
    config = ept.EPTConfig(r=4, task_names=["a", "b", "c"], target_modules=["0", "1"])
    return awaken(peft.get_peft_model(net, config))


def _layer(model: peft.PeftModel, index: int = 0) -> nn.Module:
    return model.base_model.model[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_adds_the_update_to_what_the_base_gives(quantise: Callable, dtype: torch.dtype) -> None:
    model = _adapted(quantise).eval()
    layer, x = _layer(model), torch.randn(3, 5, 64, dtype=dtype)
    assert is_quantised(layer.base_layer) and not has_dense_weight(layer.base_layer)
    base = layer.base_layer(x)
    with torch.no_grad(), ept.use_tasks(["b", "a", "c"]):
        found = layer(x)
    assert found.dtype == base.dtype
    deltas = [layer.get_delta_weight("default", task) for task in "bac"]
    expected = base.double() + torch.stack([x[i].double() @ delta.double().T for i, delta in enumerate(deltas)])
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_of_input_and_adapter(quantise: Callable) -> None:
    """The base's own gradient for the input, plus the update's; the adapter's as on an ordinary base."""
    model = _adapted(quantise).train()
    layer, cotangent = _layer(model), torch.randn(4, 128)
    x = torch.randn(4, 64, requires_grad=True)
    (base_gradient,) = torch.autograd.grad(layer.base_layer(x), x, cotangent)
    with ept.use_tasks(1):
        layer(x).backward(cotangent)
    delta = layer.get_delta_weight("default", 1).detach()
    assert_matches(x.grad, base_gradient.double() + cotangent.double() @ delta.double(), 1e-5)
    plain = copy.deepcopy(layer.ept_adapters["default"])
    plain.zero_grad()
    plain.linear(x, torch.zeros(128, 64), None, 1).backward(cotangent)
    for (name, found), expected in zip(
        layer.ept_adapters["default"].named_parameters(), plain.parameters(), strict=True
    ):
        if expected.grad is not None:
            assert_matches(found.grad, expected.grad, 1e-5, name)
    assert all(p.grad is None for p in layer.base_layer.parameters())


def test_gradients_survive_an_evaluation(quantise: Callable) -> None:
    """bitsandbytes lays 4-bit weights out for a CPU kernel without a backward pass at the first evaluation."""
    model, x = _adapted(quantise).train(), torch.randn(6, 64)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with ept.use_tasks(2):
            model(x).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.eval()
    with torch.no_grad(), ept.use_tasks(2):
        model(x)
    model.train()
    after = gradients()
    assert after.keys() == before.keys()
    below = [name for name in before if ".model.0." in name and name.endswith(".A")]
    assert below and all(before[name].norm() > 0 for name in below)
    for name in before:  # the repacked scales are bf16
        assert relative_error(after[name], before[name]) < 2e-2, name


def test_merging_is_refused_and_changes_nothing(quantise: Callable, tmp_path: Path) -> None:
    model, x = _adapted(quantise).eval(), torch.randn(3, 64)
    with torch.no_grad(), ept.use_tasks(0):
        expected = model(x)
        with pytest.raises(ValueError, match=r"cannot merge into Linear.*export_merged.*dequantise=True"):
            model.base_model.merge_adapter(task=0)
        with pytest.raises(ValueError, match=r"'0\.base_layer' has a quantised weight"):
            ept.export_merged(model, 0, tmp_path / "merged")
        assert torch.equal(model(x), expected) and model.base_model.merged_task is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("evaluated", [False, True])
def test_dequantised_is_what_the_base_computes_with(quantise: Callable, evaluated: bool) -> None:
    linear = nn.Linear(64, 128)
    original = linear.weight.detach().clone()
    layer, x = quantise(linear).eval(), torch.randn(40, 64)
    if evaluated:
        with torch.no_grad():
            layer(x)
    repacked = is_repacked(layer)
    plain = dequantised(layer, torch.float32)
    assert type(plain) is nn.Linear or type(layer) is nn.Linear
    assert has_dense_weight(plain) and is_repacked(layer) == repacked
    assert relative_error(plain.weight, original) < 0.12  # nf4's; int8's is 0.01
    with torch.no_grad():
        assert relative_error(plain(x), layer(x)) < 1.5e-2  # int8 activations, or a bf16 kernel


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _quantisation(name: str) -> object:
    import transformers

    LIBRARIES[name]()  # skips
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(load_in_8bit=name == "bnb-int8", load_in_4bit=name == "bnb-nf4")


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_quantised_checkpoint_trains_and_exports(name: str, stored: Path, tmp_path: Path) -> None:
    options = {"quantization_config": _quantisation(name), "device_map": "cpu", "dtype": torch.float32}
    case = CASES["llama"]
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(stored, **options), case.config())
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-2)
    batch, losses = case.batch(), []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"], task_ids=[0, 1, 2]).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimiser.step(), optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(**batch, task_ids="beta").logits
    path = ept.export_merged(model, "beta", tmp_path / "merged", dequantise=True)
    script = f"""
from transformers import AutoModelForCausalLM
def result(batch):
    model = AutoModelForCausalLM.from_pretrained({str(path)!r}).eval()
    assert not hasattr(model.config, "quantization_config") and all(p.is_floating_point() for p in model.parameters())
    return model(**batch).logits
"""
    assert relative_error(without_ept(script, batch, tmp_path), expected) < 1e-2
    report = ept.export_lora(model, "beta", tmp_path / "lora")
    assert report.error == 0
    again = LlamaForCausalLM.from_pretrained(stored, **options)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    with torch.no_grad():
        assert relative_error(loaded(**batch).logits, expected) < 1e-2
        assert torch.equal(model(**batch, task_ids="beta").logits, expected), "the model is as it was"
    deltas = ept.export_deltas(model, tmp_path / "deltas")
    with pytest.raises(ValueError, match="has no dense float weight"):
        ept.apply_delta(again, deltas, "beta")


def test_hooks_of_4bit_layers_go_with_the_adapter(quantise: Callable) -> None:
    model = _adapted(quantise)
    plain = model.unload()
    assert all(is_quantised(layer) and not layer._forward_pre_hooks for layer in plain)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [(nn.Embedding(8, 16), "Embedding"), (nn.Conv2d(3, 4, 2), "Conv2d"), (nn.LayerNorm(16), "LayerNorm")],
)
def test_layers_that_are_no_linear_map_are_refused(layer: nn.Module, kind: str) -> None:
    net = nn.ModuleDict({"inner": layer, "other": nn.Linear(16, 16)})
    config = ept.EPTConfig(r=2, num_tasks=2, target_modules=["inner", "other"])
    with pytest.raises(TypeError, match=rf"target module 'inner': EPT adapts nn\.Linear .* Conv1D; got {kind}"):
        peft.get_peft_model(net, config)
    assert type(net["other"]) is nn.Linear
