"""Training steps of a LLaMA of 7B's shapes (random weights, as many blocks as fit) and of T5-base.

Frozen with input gradients, PEFT's LoRA and EPT on every linear layer of the blocks, under bf16 autocast, taking turns.
"""

from __future__ import annotations

import gc

import torch
import transformers
from harness import Timed
from memory import peak_bytes
from step import METHODS, adapted, frozen, stepper
from torch import nn

from .bench import Bench

TASKS = 4
BLOCKS = (16, 8, 4, 2)


def run(bench: Bench) -> None:
    for blocks in (1,) if bench.dry else BLOCKS:
        gc.collect()  # what a larger model left
        name = f"LLaMA-7B, {blocks} blocks"
        with bench.attempt(what="step", model=name):
            _measure(bench, name, "causal", _llama(bench, blocks), *_batch(bench, 4, 2048))
            break
    gc.collect()
    with bench.attempt(what="step", model="T5-base"):
        _measure(bench, "T5-base", "seq2seq", _t5(bench), *_batch(bench, 32, 256))


def _batch(bench: Bench, batch: int, length: int) -> tuple[int, int]:
    return (TASKS, 20) if bench.dry else (batch, length)


def _llama(bench: Bench, blocks: int) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(num_hidden_layers=blocks, **(sizes if bench.dry else {}))
    with torch.device(bench.device):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def _t5(bench: Bench) -> nn.Module:
    full = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    tiny = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    with torch.device(bench.device):
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**(tiny if bench.dry else full)))


def _measure(bench: Bench, name: str, kind: str, base: nn.Module, batch: int, length: int) -> None:
    ids = torch.randint(base.config.vocab_size, (batch, length), device=bench.device)
    labels = {"what": "step", "model": name, "tokens": batch * length, "dtype": "bf16 autocast"}
    steps = {}
    for method in ("frozen", *METHODS):
        model = frozen(base) if method == "frozen" else adapted(method, base, TASKS)
        steps[method] = stepper(method, model, ids, TASKS, kind, torch.bfloat16)
        steps[method]()  # allocates the optimizer's state, so that the peak below is a step's
        weights = sum(parameter.nbytes for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        peak = None if bench.dry else (weights + peak_bytes(steps[method], bench.device)) / 1e9
        bench.emit(way=method, **labels, peak_GB=peak, trained=trained)
    calls = {method: Timed(step) for method, step in steps.items()}
    seconds = bench.left / (2 if kind == "causal" else 1) - 2
    bench.compare(calls, key="way", baseline="frozen", rounds=12, seconds=seconds, **labels)
