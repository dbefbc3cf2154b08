"""The training-step benchmark: what it times is a training step of each method, and it reports both."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import step
import torch
import transformers


def tiny(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "causal":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes))
    if kind == "seq2seq":
        config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        return transformers.T5ForConditionalGeneration(config)
    return transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["encoder", "causal", "seq2seq"])
@pytest.mark.parametrize("method", step.METHODS)
def test_a_step_trains_the_adapter_and_nothing_else(method: str, kind: str, autocast: torch.dtype | None) -> None:
    base = tiny(kind)
    model = step.adapted(method, base, tasks=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    call = step.stepper(method, model, torch.randint(40, (6, 5)), 3, kind, autocast)
    for _ in range(3):  # a factor that starts at zero gives the other one no gradient in the first step
        call()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= {name for name, p in model.named_parameters() if p.requires_grad}
    linears = sum(name.endswith(("lora_A.default.weight", "ept_adapters.default.A")) for name in changed)
    assert linears == {"encoder": 12, "causal": 14, "seq2seq": 32}[kind]  # every linear layer of two blocks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["encoder", "causal", "seq2seq"])
def test_a_frozen_model_passes_gradients_through_every_block(kind: str) -> None:
    model = step.frozen(tiny(kind))
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split(".")):
            module.register_full_backward_hook(lambda module, gave, got, name=name: seen.append((name, gave[0])))
    step.stepper("frozen", model, torch.randint(40, (6, 5)), 3, kind, None)()
    assert len({name for name, _ in seen}) == {"encoder": 12, "causal": 14, "seq2seq": 32}[kind]
    assert all(gradient is not None for _, gradient in seen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_report_names_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs" / "step.json"
    settings = argparse.Namespace(model="tiny", batch=6, length=5, tasks=3, dtype="fp32", json=file)
    samples = {"lora": [2.0, 4.0, 2.0], "ept": [1.0, 2.0, 1.0]}
    step.report(settings, torch.device("cpu"), samples, {"lora": 12, "ept": 7})
    printed = capsys.readouterr().out
    assert "0.500" in printed
    record = json.loads(file.read_text())
    assert record["ept"] == {"ms": 1000.0, "ratio": 0.5, "low": 0.5, "high": 0.5}
    assert record["trained"] == {"lora": 12, "ept": 7}
