"""The paper's seven ablations of EPT as settings (its table 4; spec section 4 has the published means)."""

from __future__ import annotations

from typing import Any, NamedTuple


class Ablation(NamedTuple):
    """What an ablation sets, by name of the setting, and in words.

    ``top_k="all"`` stands for the number of experts, whatever it is.
    """

    settings: dict[str, Any]
    text: str


ABLATIONS: dict[str, Ablation] = {
    "zero-init-seed": Ablation({"init_seed": "zero"}, "B starts at zero, the kernels do not"),
    "no-top-k": Ablation({"top_k": "all"}, "every task mixes all experts"),
    "no-alp-scaling": Ablation({"alp_scaling": False}, "no dimension-aware scale"),
    "no-contrastive-loss": Ablation({"contrastive_weight": 0.0}, "no contrastive task loss"),
    "all-2": Ablation({"kernel_sizes": (2,) * 8}, "eight experts of scale 2"),
    "all-8": Ablation({"kernel_sizes": (8,) * 8}, "eight experts of scale 8"),
    "mixed": Ablation(
        {"kernel_sizes": (2, 2, 4, 4, 6, 6, 8, 8)}, "the method itself, the pyramid that the others lack"
    ),
}
