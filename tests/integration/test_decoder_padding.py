"""Losses of their own that methods add, in an encoder-decoder: padding of either side has no part in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from systems_testing import SMALL
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import ept
from ept.training.options import SYSTEMS

from .conftest import CASES

METHODS = ("ept", "more", "mixlora")
TASKS = ["a", "b"]
TARGETS = {"t5": ["q", "k", "v", "o", "wi", "wo"], "bart": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]}


def bart() -> nn.Module:
    sizes = {"d_model": 32, "max_position_embeddings": 32, "vocab_size": 96, "dropout": 0.0}
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    return BartForConditionalGeneration(BartConfig(**sizes, **sides, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def adapted(name: str, method: str) -> PeftModel:
    torch.manual_seed(0)
    base = bart() if name == "bart" else CASES["t5"].build()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    options = {**SMALL[method], "target_modules": TARGETS[name], "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(base, SYSTEMS[method].make_config(TASKS, **options)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(prompt: int, answer: int) -> dict[str, Tensor]:
    """The same four samples of 5 to 7 and 2 to 4 tokens, padded to these lengths."""
    generator = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(3, 48, (4, n), generator=generator) for n in (7, 4))
    mask = (torch.arange(7) < torch.tensor([[5], [7], [6], [5]])).long()
    labels = labels.masked_fill(torch.arange(4) >= torch.tensor([[4], [2], [3], [3]]), -100)
    pad = nn.functional.pad
    return {
        "input_ids": pad(ids * mask, (0, prompt - 7)),
        "attention_mask": pad(mask, (0, prompt - 7)),
        "labels": pad(labels, (0, answer - 4), value=-100),
        "task_ids": torch.tensor([0, 1, 1, 0]),
    }


def losses_and_gradients(model: PeftModel, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    own = ept.auxiliary_loss(model)
    (loss + own).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack([loss.detach(), own.detach()]), gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TARGETS)
# The last: prompts as long as answers, so that only the place in the model tells whose tokens a layer reads.
@pytest.mark.parametrize("lengths", [(7, 9), (12, 4), (9, 9)])
def test_padding_has_no_part_in_a_methods_own_loss(name: str, method: str, lengths: tuple[int, int]) -> None:
    model = adapted(name, method)
    losses, gradients = losses_and_gradients(model, batch(7, 4))
    padded, padded_gradients = losses_and_gradients(model, batch(*lengths))
    assert losses[1] > 0
    torch.testing.assert_close(padded, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded_gradients, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_recomputes_with_the_decoders_mask(method: str) -> None:
    model = adapted("t5", method)
    losses, gradients = losses_and_gradients(model, batch(9, 9))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed, recomputed_gradients = losses_and_gradients(model, batch(9, 9))
    torch.testing.assert_close(recomputed, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(recomputed_gradients, gradients, rtol=1e-9, atol=1e-12)


def test_a_given_decoder_mask_counts_before_the_labels() -> None:
    model = adapted("t5", "mixlora")
    inputs = batch(7, 9)
    _, expected = losses_and_gradients(model, inputs)
    masked = {**inputs, "decoder_attention_mask": (inputs["labels"] != -100).long()}
    _, given = losses_and_gradients(model, masked)
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-12)
    whole = {**inputs, "decoder_attention_mask": torch.ones_like(inputs["labels"])}
    _, other = losses_and_gradients(model, whole)
    assert any(not torch.allclose(other[name], expected[name]) for name in expected)
