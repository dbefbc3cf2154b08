"""The methods beside EPT from their definitions (spec section 6), sample by sample in plain products: their oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ept

CONFIGS = {
    "more": lambda **options: ept.MoREConfig(**{"r": 5, "num_tasks": 3} | options),
    "moelora": lambda **options: ept.MOELoRAConfig(**{"r": 6, "num_experts": 3, "num_tasks": 3} | options),
    "dcft": lambda **options: ept.DCFTConfig(**{"kernel_size": 3, "num_tasks": 3} | options),
    "mixlora": lambda **options: ept.MixLoRAConfig(**{"r": 4, "num_experts": 5, "num_tasks": 3} | options),
}
LAYERS = {
    "more": ept.MoRELinear,
    "moelora": ept.MOELoRALinear,
    "dcft": ept.DCFTLinear,
    "mixlora": ept.MixLoRALinear,
}


def more_delta(state: dict[str, Tensor], config: ept.MoREConfig, task: int) -> Tensor:
    """``(alpha / r) B diag(c) A``; the gate's gradient is that of a softmax, straight through the choice."""
    probabilities = torch.softmax(state["gate"] @ state["own_shared.weight"][task], 0)
    best = int(probabilities.argmax())
    core = torch.zeros_like(probabilities)
    for rank in range(1, config.r + 1):
        indicator = float(rank - 1 == best) + probabilities[rank - 1] - probabilities[rank - 1].detach()
        prefix = torch.tensor([rank / config.r if i < rank else 0.0 for i in range(config.r)], dtype=core.dtype)
        core = core + indicator * prefix
    return config.lora_alpha / config.r * state["B"] @ torch.diag(core) @ state["A"]


def moelora_delta(state: dict[str, Tensor], config: ept.MOELoRAConfig, task: int) -> Tensor:
    weights = torch.softmax(state["own_shared.gate"] @ state["own_shared.embedding"][task], 0)
    rank = config.r // config.num_experts
    total = 0
    for expert in range(config.num_experts):
        rows = slice(expert * rank, (expert + 1) * rank)
        total = total + weights[expert] * state["B"][:, rows] @ state["A"][rows]
    return config.lora_alpha / config.r * total


def dcft_delta(state: dict[str, Tensor], config: ept.DCFTConfig, task: int) -> Tensor:
    out_features, in_features = state["weight"].shape
    whole = torch.kron(state["B"] @ state["A"], state["c"])
    return config.lora_alpha / config.r * whole[:out_features, :in_features]


DELTAS = {"more": more_delta, "moelora": moelora_delta, "dcft": dcft_delta}


def layer_reference(name: str, state: dict[str, Tensor], config: ept.MoREConfig, x: Tensor, tasks: list[int]) -> Tensor:
    """x ``[batch, ..., in]`` -> ``[batch, ..., out]``, one task a sample."""
    if name == "mixlora":
        return mixlora_linear(x, state["weight"], state.get("bias"), state, config, state["own_shared.routers.linear"])
    rows = [
        F.linear(x[i], state["weight"] + DELTAS[name](state, config, task), state.get("bias"))
        for i, task in enumerate(tasks)
    ]
    return torch.stack(rows) if rows else F.linear(x, state["weight"], state.get("bias"))


def token_weights(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """Weight of every expert for the token x ``[d]``, zero for all but the best, which sum to 1."""
    probabilities = torch.softmax(router @ x, 0)
    best = probabilities.detach().argsort(descending=True)[:top_k]
    kept = torch.zeros_like(probabilities).index_fill(0, best, 1.0)
    return probabilities * kept / (probabilities * kept).sum()


def mixlora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor], config: ept.MixLoRAConfig, router: Tensor
) -> Tensor:
    """A linear alone in its network: the experts' full weights, mixed token by token."""
    experts = weight + config.lora_alpha / config.r * state["B"] @ state["A"]  # [E, out, in]
    outputs = []
    for token in x.reshape(-1, x.shape[-1]):
        weights = token_weights(token, router, config.top_k)
        outputs.append(sum(w * F.linear(token, expert, bias) for w, expert in zip(weights, experts, strict=True)))
    return torch.stack(outputs).view(*x.shape[:-1], -1) if outputs else F.linear(x, weight, bias)


def awaken_all(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Fresh normal values for all that is trainable: an adapter that changes the output."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return module
