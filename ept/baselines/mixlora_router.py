"""MixLoRA's routers: one for each feed-forward network, deciding for every token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ept_kernels import without_autocast

from ..context import TaskContext, current
from ..ranks import number_of_ranks, sum_over_ranks
from ..tasks import TaskNames

ENTRY, EXIT, WHOLE = "entry", "exit", "whole"


class Place(NamedTuple):
    """A linear's place in a feed-forward network.

    Attributes:
        block: the network's name: the path up to its block's number.
        role: ``entry`` reads the network's input, ``exit`` writes its output; ``whole`` is both.
    """

    block: str
    role: str


def ffn_places(features: Mapping[str, tuple[int, int]]) -> dict[str, Place]:
    """The places of those linears that belong to a feed-forward network, by name.

    Linears of a repeated block (a number in their path) none of whose path's names speaks of attention form its
    network: ``layers.0.mlp.{gate,up,down}_proj`` of LLaMA, ``layer.0.{intermediate,output}.dense`` of BERT,
    ``block.0.layer.1.DenseReluDense.{wi,wo}`` of T5. Its exit is the one whose input is not the network's; a linear
    alone is a whole network, and so is one outside any model, whose name is empty.

    Args:
        features: ``(in_features, out_features)`` of the adapted linears by name, in the model's order.

    Raises:
        ValueError: several linears of a block that do not lead from its width to a hidden one and back.
    """
    blocks: dict[str, list[str]] = {}
    for name in features:
        match = re.match(r"(.*\.)?\d+(?=\.)", name)
        attention = any("attn" in part or "attention" in part for part in name.lower().split("."))
        if name == "" or (match is not None and not attention):
            blocks.setdefault(match[0] if match else "", []).append(name)
    places = {}
    for block, names in blocks.items():
        if len(names) == 1:
            places[names[0]] = Place(block, WHOLE)
            continue
        width = features[names[0]][0]
        others = [name for name in names if features[name][0] != width]
        exits = others or names[-1:]
        if len(exits) != 1 or features[exits[0]][1] != width:
            sizes = ", ".join(f"{name} {features[name][0]} -> {features[name][1]}" for name in names)
            raise ValueError(
                f"target_modules adapts these linears of the feed-forward network {block!r}: {sizes}; "
                f"MixLoRA needs all that lead in and the one that leads back to width {width}, or one of them alone"
            )
        places |= {name: Place(block, EXIT if name in exits else ENTRY) for name in names}
    return places


_STD = 0.02  # of the routers at the start


class TokenRoute(NamedTuple):
    """What a router decided for x ``[..., d]``: ``experts [..., k]`` int64 and ``weights [..., k]``, which sum to 1."""

    experts: Tensor
    weights: Tensor


class TokenRouters(TaskNames):
    """All routers of an adapter, and which linear is where.

    Attributes:
        routers: ``[E, d]`` for each network, N(0, 0.02^2).
        places: place of every routed linear, by name.
    """

    def __init__(
        self,
        num_tasks: int,
        names: Sequence[str] | None,
        places: Mapping[str, Place],
        widths: Mapping[str, int],
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_tasks, names, device=device)
        self.places, self.num_experts, self.top_k = dict(places), num_experts, top_k
        self.routers = nn.ParameterDict(
            {
                _key(block): nn.Parameter(torch.empty(num_experts, width, device=device, dtype=dtype))
                for block, width in widths.items()
            }
        )
        self._outside: dict[Any, tuple[Tensor, TokenRoute]] = {}  # routes of layers called outside a model's forward
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for router in self.routers.values():
            nn.init.normal_(router, std=_STD)

    def route(self, block: str, x: Tensor, *, for_exit: bool = True) -> TokenRoute:
        """The route of x ``[..., d]``; linears that read the same x one after the other get the same one.

        Args:
            for_exit: the network has an exit, which will ask for this route. Outside a model's forward pass nothing
                else tells one pass from the next, so without an exit nothing is kept there.
        """
        context = current()
        if context is None and not for_exit:
            return self._decide(block, x, context)
        store, key = self._kept_at(context, block)
        known = store.get(key)
        if known is None or known[0] is not x:
            known = store[key] = (x, self._decide(block, x, context))
        return known[1]

    def last_route(self, block: str) -> TokenRoute:
        """The route that the network's entry has used, for its exit.

        Raises:
            ValueError: the entry has not been called.
        """
        store, key = self._kept_at(current(), block)
        known = store.pop(key, None)
        if known is None:
            raise ValueError(f"the exit of the feed-forward network {block!r} was called before its entry")
        return known[1]

    def _kept_at(self, context: TaskContext | None, block: str) -> tuple[dict[Any, Any], tuple[Any, ...]]:
        """Where a block's route is kept: with its pass; outside of one, two threads may be in the same block."""
        key = (id(self), block)
        return (self._outside, (get_ident(), *key)) if context is None else (context.shared, key)

    def _decide(self, block: str, x: Tensor, context: TaskContext | None) -> TokenRoute:
        router = self.routers[_key(block)]
        dtype = torch.promote_types(router.dtype, torch.float32)
        with without_autocast(x.device):
            probabilities = (x.to(dtype) @ router.to(x.device, dtype).T).softmax(-1)
            best, experts = probabilities.topk(self.top_k, dim=-1)
            if context is not None and context.terms is not None:
                context.terms.append(expert_load(probabilities, experts[..., 0], context.mask_of(x)))
            return TokenRoute(experts, best / best.sum(-1, keepdim=True))

    def part_sizes(self) -> dict[str, int]:
        return {"routers": sum(router.numel() for router in self.routers.values())}


def expert_load(probabilities: Tensor, best: Tensor, mask: Tensor | None) -> Tensor:
    """Of every expert, how many tokens have it as their best (no gradient), and its probabilities' sum: ``[2, E]``.

    Args:
        probabilities: ``[..., E]``. best: ``[...]``.
        mask: ``[...]``, 0 for padding, which does not count; None, or one of another shape, counts all.
    """
    weights = torch.ones_like(best, dtype=probabilities.dtype)
    if mask is not None and mask.shape == best.shape:
        weights = mask.to(probabilities)
    weights = weights.flatten()
    chosen = nn.functional.one_hot(best.flatten(), probabilities.shape[-1]).to(probabilities)
    return torch.stack([weights @ chosen, weights @ probabilities.flatten(0, -2)])


def load_balance(loads: Tensor) -> Tensor:
    """``E sum_e f_e P_e`` of ``expert_load [..., 2, E]``: 1 where experts share the tokens evenly, E where one has all.

    f_e is the share of tokens whose best expert is e (no gradient), P_e the mean probability of e, both over the tokens
    of all processes of a ``torch.distributed`` job: f is the same on all of them, and the mean of what they return is
    the loss of the whole batch. Every process must call this.
    """
    counts, sums = loads.unbind(-2)
    counts = sum_over_ranks(counts.detach())
    tokens = counts.sum(-1, keepdim=True).clamp_min(1)
    return counts.shape[-1] * (counts * sums / tokens.square()).sum(-1) * number_of_ranks()


def _key(block: str) -> str:
    """The block's name as a parameter may be named: without dots."""
    return block.replace(".", "/") or "linear"
