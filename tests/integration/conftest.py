"""Tiny, randomly initialised models of every architecture that the README names, adapted by EPT."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import ept

TASKS = ["alpha", "beta", "gamma"]
VOCABULARY, WIDTH, BATCH = 64, 32, 3


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=44,  # no scale but 2 and 4 divides it
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _t5(gated: bool = False) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu" if gated else "relu",
        )
    )


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )


@dataclass
class Case:
    """An architecture: how to build it, PEFT's task type for it, and what to adapt."""

    build: Callable[[], nn.Module]
    task_type: str | None
    generates: bool = False

    def batch(self) -> dict[str, torch.Tensor]:
        if self.build is _vit:
            return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
        ids = torch.randint(3, VOCABULARY, (BATCH, 7))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.task_type == "SEQ_2_SEQ_LM":
            batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (BATCH, 5))
        return batch

    def config(self, **overrides: Any) -> ept.EPTConfig:
        settings = {
            "r": 4,
            "task_names": TASKS,
            "task_type": self.task_type,
            "target_modules": "all-linear",
            "exclude_modules": ["classifier"],
        }
        return ept.EPTConfig(**{**settings, **overrides})


CASES = {
    "llama": Case(_llama, "CAUSAL_LM", generates=True),
    "t5": Case(_t5, "SEQ_2_SEQ_LM", generates=True),
    "t5-gated": Case(lambda: _t5(gated=True), "SEQ_2_SEQ_LM", generates=True),
    "bert": Case(_bert, "SEQ_CLS"),
    "gpt2": Case(_gpt2, "CAUSAL_LM", generates=True),
    "vit": Case(_vit, None),
}


def awaken(model: nn.Module, std: float = 1.0) -> nn.Module:
    """Fresh random kernels: an adapter that changes the output."""
    for name, parameter in model.named_parameters():
        if "kernels." in name:
            nn.init.normal_(parameter, std=std)
    return model


def adapted(case: Case, base: nn.Module, **overrides: Any) -> peft.PeftModel:
    return awaken(peft.get_peft_model(copy.deepcopy(base), case.config(**overrides))).eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(1234)
    return CASES[request.param]
