"""Small trained-looking adapters in folders, and the models they came from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ept
from ept.config import AdapterConfig

TASKS = ["alpha", "</script><script>document.title='broken'</script>", "gamma & <b>delta</b>"]


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PeftModel, Path]]:
    """Makes an adapter with random parameters and saves it: the model and the folder."""

    def make(config: AdapterConfig | None = None, **options: object) -> tuple[PeftModel, Path]:
        if config is None:
            settings = {"r": 3, "kernel_sizes": (2, 2, 3, 4, 6, 8), "task_names": TASKS, "target_modules": "all-linear"}
            config = ept.EPTConfig(**settings | options)
        model = get_peft_model(base_model(), config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".ept_" in name:
                    parameter.normal_()
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def adapter(save: Callable[..., tuple[PeftModel, Path]]) -> SimpleNamespace:
    """An EPT adapter: ``model`` and ``folder``."""
    model, folder = save()
    return SimpleNamespace(model=model, folder=folder)
