"""MixLoRA in the feed-forward networks of real models: whole experts, one router a network, balance, refusals."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
import transformers
from baselines_testing import awaken_all, token_weights
from torch import nn

import ept
from ept.baselines.mixlora_router import ENTRY, EXIT, WHOLE, Place, expert_load, ffn_places, load_balance

EXPERTS, TOP_K = 4, 2


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=32, **sizes))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=32, **sizes), add_pooling_layer=False)


def t5(projection: str = "relu") -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 28, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    return transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj=projection, **sizes))


def square_t5() -> nn.Module:
    """A hidden width equal to the model's: sizes alone do not tell the exit."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


#: A model, a network in it, and how the plain network maps x given the linears by name.
NETWORKS = {
    "llama": (llama, "layers.1.mlp", ("gate_proj", "up_proj", "down_proj")),
    "t5": (t5, "encoder.block.1.layer.1.DenseReluDense", ("wi", "wo")),
    "t5-gated": (lambda: t5("gated-gelu"), "encoder.block.1.layer.1.DenseReluDense", ("wi_0", "wi_1", "wo")),
    "t5-square": (square_t5, "encoder.block.0.layer.1.DenseReluDense", ("wi", "wo")),
}


def adapted(base: nn.Module, **options) -> peft.PeftModel:
    settings = {"r": 3, "num_experts": EXPERTS, "top_k": TOP_K, "num_tasks": 1, "target_modules": "all-linear"}
    model = peft.get_peft_model(copy.deepcopy(base), ept.MixLoRAConfig(**settings | options))
    return awaken_all(model).double().eval()


def expert_network(model: peft.PeftModel, path: str, linears: tuple[str, ...], expert: int) -> nn.Module:
    """The network with one expert's update in its weights: FFN_e."""
    network = copy.deepcopy(model.base_model.model.get_submodule(path))
    for name in linears:
        layer = network.get_submodule(name)
        adapter = layer.ept_adapters["default"]
        base = layer.get_base_layer()
        with torch.no_grad():
            base.weight += adapter.scaling * adapter.B[expert] @ adapter.A[expert]
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, base)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_weighted_sum_of_whole_experts(name: str) -> None:
    torch.manual_seed(0)
    build, path, linears = NETWORKS[name]
    model = adapted(build())
    block = re.match(r".*\d+(?=\.)", path)[0].replace(".", "/")
    router = model.base_model.ept_task_tables["default"].routers[block]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    experts = [expert_network(model, path, linears, e) for e in range(EXPERTS)]
    with torch.no_grad():
        outputs = torch.stack([expert(x) for expert in experts])
        found = model.base_model.model.get_submodule(path)(x)
        for sample in range(2):
            for position in range(5):
                weights = token_weights(x[sample, position], router, TOP_K)
                expected = (weights[:, None] * outputs[:, sample, position]).sum(0)
                torch.testing.assert_close(found[sample, position], expected, atol=1e-12, rtol=1e-10)


def test_bert_network_spans_two_modules() -> None:
    torch.manual_seed(1)
    model = adapted(bert())
    layer = model.base_model.model.encoder.layer[0]
    router = model.base_model.ept_task_tables["default"].routers["encoder/layer/0"]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        outputs = []
        for expert in range(EXPERTS):
            hidden = x
            for module in (layer.intermediate.dense, layer.output.dense):
                adapter, base = module.ept_adapters["default"], module.get_base_layer()
                weight = base.weight + adapter.scaling * adapter.B[expert] @ adapter.A[expert]
                hidden = nn.functional.linear(hidden, weight, base.bias)
                hidden = (
                    layer.intermediate.intermediate_act_fn(hidden) if module is layer.intermediate.dense else hidden
                )
            outputs.append(hidden)
        weights = torch.stack([torch.stack([token_weights(t, router, TOP_K) for t in sample]) for sample in x])
        mixed = torch.einsum("bse,ebsd->bsd", weights, torch.stack(outputs))
        expected = layer.output.LayerNorm(mixed + x)
        found = layer.feed_forward_chunk(x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_gradients_reach_experts_and_routers() -> None:
    torch.manual_seed(2)
    build, path, _ = NETWORKS["t5"]
    model = adapted(build())
    network = model.base_model.model.get_submodule(path)
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    router = model.base_model.ept_task_tables["default"].routers["encoder/block/1/layer/1"]
    parameters = [router, *(p for p in network.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(network(x).square().sum(), parameters)
    step = 1e-6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                values.append(network(x).square().sum().item())
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_places() -> None:
    sizes = {
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.0.mlp.gate_proj": (8, 20),
        "model.layers.0.mlp.up_proj": (8, 20),
        "model.layers.0.mlp.down_proj": (20, 8),
        "decoder.block.3.layer.1.EncDecAttention.o": (8, 8),
        "decoder.block.3.layer.2.DenseReluDense.wo": (20, 8),
        "classifier.dense": (8, 8),
    }
    assert ffn_places(sizes) == {
        "model.layers.0.mlp.gate_proj": Place("model.layers.0", ENTRY),
        "model.layers.0.mlp.up_proj": Place("model.layers.0", ENTRY),
        "model.layers.0.mlp.down_proj": Place("model.layers.0", EXIT),
        "decoder.block.3.layer.2.DenseReluDense.wo": Place("decoder.block.3.layer.2", WHOLE),
    }


def test_networks_without_an_exit_are_refused() -> None:
    base = llama()
    with pytest.raises(ValueError, match=r"target_modules adapts these linears.*layers\.0.*up_proj 16 -> 28"):
        adapted(base, target_modules=["gate_proj", "up_proj"])
    with pytest.raises(ValueError, match="none of which belongs to a feed-forward network"):
        adapted(base, target_modules=["q_proj"])
    assert "MixLoRA" not in repr(base)


def test_load_balance_counts_tokens_not_padding() -> None:
    torch.manual_seed(3)
    probabilities = torch.rand(3, 7, EXPERTS, dtype=torch.float64).softmax(-1)
    best = probabilities.argmax(-1)
    mask = (torch.rand(3, 7) < 0.6).long()
    kept = [(probabilities[i, j], int(best[i, j])) for i in range(3) for j in range(7) if mask[i, j]]
    share = [sum(b == e for _, b in kept) / len(kept) for e in range(EXPERTS)]
    mean = torch.stack([p for p, _ in kept]).mean(0)
    expected = EXPERTS * sum(share[e] * mean[e] for e in range(EXPERTS))
    torch.testing.assert_close(load_balance(expert_load(probabilities, best, mask)), expected)
    even = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS)
    assert load_balance(expert_load(even, torch.arange(EXPERTS), None)) == pytest.approx(1)
    one = expert_load(torch.eye(EXPERTS)[:1].expand(5, -1), torch.zeros(5, dtype=torch.long), None)
    assert load_balance(one) == EXPERTS


def test_balance_loss_has_a_term_for_each_network_and_ignores_padding() -> None:
    torch.manual_seed(4)
    model = adapted(llama()).train()
    ids = torch.randint(0, 32, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    losses = []
    for filler in (3, 9):
        model(input_ids=ids.masked_fill(mask == 0, filler), attention_mask=mask)
        losses.append(ept.auxiliary_losses(model)["load_balance_loss"][1])
        assert len(model.base_model._trained.terms) == 2
    torch.testing.assert_close(losses[0], losses[1])
    assert float(ept.auxiliary_loss(model)) == pytest.approx(0.01 * losses[1].item())


def test_exit_before_entry_is_refused() -> None:
    model = adapted(llama())
    with pytest.raises(ValueError, match="was called before its entry"):
        model.base_model.model.layers[0].mlp.down_proj(torch.randn(2, 3, 28, dtype=torch.float64))
