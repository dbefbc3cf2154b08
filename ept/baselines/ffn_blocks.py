"""Which adapted linears make up a feed-forward network, told by the names and sizes that all transformers share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

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
