"""``TuckAConfig``: every hyperparameter of a TuckA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from ept.adapter_config import AdapterConfig, check, check_size, is_number
from ept.peft_type import TaskRoutedPeftType

TUCKA = TaskRoutedPeftType("TUCKA")

INITS = ("kaiming", "centred")


@dataclass
class TuckAConfig(AdapterConfig):
    """Configuration of TuckA (arXiv 2511.06859). The defaults are those of the authors' GLUE runs.

    Args (beyond those of ``AdapterConfig``, where tasks only name what a model's heads may want):
        r: rank of the basis U and side of every slice of a core.
        lora_alpha: scale alpha of the update; not divided by r, for the norm of the factors is 1 whatever r.
        num_groups: K, groups of experts; a batch uses one.
        group_size: t, experts in a group.
        core_rank: p, slices of a group's core that its experts mix.
        centroid_noise: sigma, half the width of the uniform noise between the first centroids, in the units of the
            router's input.
        init: "kaiming" (the method) or "centred", which starts as a no-op (see ``TuckerAdapter``).
        router_module: name, or end of the name, of the adapted module that routes: the first one called in a forward
            pass. None: the one that the model's first pass calls first, if its input has the width of the first in the
            model's order of modules.
    """

    lora_alpha: float = field(default=2.0, metadata={"help": "Scale of the update."})
    num_groups: int = field(default=2, metadata={"help": "Groups of experts."})
    group_size: int = field(default=2, metadata={"help": "Experts in a group."})
    core_rank: int = field(default=2, metadata={"help": "Slices of a group's core."})
    centroid_noise: float = field(default=10.0, metadata={"help": "Noise between the first centroids."})
    init: str = field(default="kaiming", metadata={"help": "'kaiming' or 'centred'."})
    router_module: str | None = field(default=None, metadata={"help": "The adapted module that routes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TUCKA
        for name in ("num_groups", "group_size", "core_rank"):
            check_size(name, getattr(self, name))
        check(
            self.group_size >= 2 or self.num_groups == 1,
            f"group_size must be at least 2 where num_groups is {self.num_groups} (one score divided by its norm is "
            f"the same in every group), got {self.group_size!r}",
        )
        check(
            is_number(self.centroid_noise) and self.centroid_noise > 0,
            f"centroid_noise must be a number > 0, got {self.centroid_noise!r}",
        )
        check(
            isinstance(self.init, str) and self.init in INITS,
            f"init must be one of {', '.join(INITS)}, got {self.init!r}",
        )
        check(
            self.init != "centred" or self.core_rank >= 2,
            f"core_rank must be at least 2 where init is 'centred', got {self.core_rank!r}",
        )
        check(
            self.router_module is None or (isinstance(self.router_module, str) and bool(self.router_module)),
            f"router_module must be None or the name of a module, got {self.router_module!r}",
        )
