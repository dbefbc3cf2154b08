"""The adapters and layers that ``make.py`` saved once, and what ``test_golden.py`` asks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ept

HERE = Path(__file__).parent
TASKS = ["alpha", "beta", "gamma"]
MIXED = ["gamma", "alpha", "beta", "alpha"]
IN_FEATURES, OUT_FEATURES = 14, 11


def base_model() -> nn.Module:
    """The frozen model below every saved adapter; its weights are in ``base.safetensors``."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=22,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def batch() -> dict[str, Tensor]:
    ids = (torch.arange(4 * 6).view(4, 6) * 7 + 3) % 16
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def layer_input() -> Tensor:
    """``[4, 3, in]``."""
    return torch.sin(torch.arange(4 * 3 * IN_FEATURES, dtype=torch.float32)).view(4, 3, IN_FEATURES)


def train_once(model: nn.Module) -> None:
    """A pass in training mode: what learns from the data itself (centroids, prototypes) does."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(**batch(), task_ids=MIXED)


def grow(model: nn.Module) -> None:
    model.add_task("delta", new_kernels=(4, 2))
    model.add_task("epsilon", like="delta")


@dataclass(frozen=True)
class Saved:
    """A model's adapter: its config, what is done to the model before it is saved, the tasks of the stored batch."""

    config: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] | None = None
    task_ids: Any = field(default_factory=lambda: MIXED)

    def make(self) -> Any:
        settings = {"r": 2, "task_names": TASKS, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
        return self.config(**{**settings, **self.options})


EPT = {"kernel_sizes": (2, 2, 3, 4)}
ADAPTERS = {
    "ept": Saved(ept.EPTConfig, EPT),
    "ept-embedding": Saved(ept.EPTConfig, {**EPT, "task_embedding_dim": 5, "alp_scaling": False, "top_k": 3}),
    "ept-patterns": Saved(
        ept.EPTConfig,
        {
            **EPT,
            "kernel_pattern": {"self_attn.q_proj": (2, 4)},
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"o_proj": 8},
            "row_layout": {"down_proj": "batch_first"},
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": [1, 5],
        },
    ),
    "ept-auto": Saved(ept.EPTConfig, {**EPT, "auto_routing": True}, train_once, "auto"),
    "ept-token": Saved(ept.EPTConfig, {**EPT, "routing": "token"}),
    "ept-grown": Saved(ept.EPTConfig, EPT, grow, ["gamma", "alpha", "delta", "epsilon"]),
    "ept-one": Saved(ept.EPTConfig, {"kernel_sizes": (3,), "top_k": 1}, None, "beta"),
    "moelora": Saved(ept.MOELoRAConfig, {"r": 4, "num_experts": 2, "task_embedding_dim": 5}),
    "more": Saved(ept.MoREConfig, {"r": 3, "task_embedding_dim": 5}),
    "mixlora": Saved(ept.MixLoRAConfig, {"num_experts": 3}),
    "dcft": Saved(ept.DCFTConfig, {"kernel_size": 3, "task_names": ["alpha"]}, None, "alpha"),
    "tucka": Saved(ept.TuckAConfig, {"num_groups": 3}, train_once),
}
LAYERS = {
    "ept": (ept.EPTLinear, ept.EPTConfig(r=2, num_tasks=4, **EPT)),
    "ept-token": (ept.EPTLinear, ept.EPTConfig(r=2, num_tasks=4, routing="token", **EPT)),
    "moelora": (ept.MOELoRALinear, ept.MOELoRAConfig(r=4, num_experts=2, num_tasks=4)),
    "more": (ept.MoRELinear, ept.MoREConfig(r=3, num_tasks=4)),
    "mixlora": (ept.MixLoRALinear, ept.MixLoRAConfig(r=2, num_experts=3, num_tasks=4)),
    "dcft": (ept.DCFTLinear, ept.DCFTConfig(kernel_size=3, num_tasks=4)),
    "tucka": (ept.TuckALinear, ept.TuckAConfig(r=2, num_tasks=4)),
}


def make_layer(name: str) -> nn.Module:
    layer_class, config = LAYERS[name]
    return layer_class(IN_FEATURES, OUT_FEATURES, config=config)
