"""``TuckAConfig``: every hyperparameter of a TuckA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from ept.config import _check, _is_int, _is_number
from ept.peft_type import TaskRoutedPeftType

from .adapter import INITS

TUCKA = TaskRoutedPeftType("TUCKA")


@dataclass
class TuckAConfig(PeftConfig):
    """Configuration of TuckA (arXiv 2511.06859). The defaults are those of the authors' GLUE runs.

    Args:
        r: rank of the basis U and side of every core slice.
        alpha: scale of the update; not divided by r.
        num_groups: K, groups of experts; a batch uses one.
        group_size: t, experts in a group.
        core_rank: p, slices of a group's core that its experts mix.
        centroid_noise: sigma, half the width of the uniform noise between the first centroids, in the units of the
            router's input.
        init: "kaiming" (the method) or "centred", which starts as a no-op (see ``TuckerAdapter``).
        router_module: name, or end of the name, of the adapted module that routes: the first one called in a forward
            pass. None: the first in the model's order of modules, which is that of most models.
        target_modules: names or a regular expression of the modules to adapt, or "all-linear". None: PEFT's default for
            the architecture.
        exclude_modules: names or a regular expression of modules never to adapt.
        layers_to_transform, layers_pattern: restrict to these layer indices, as in ``LoraConfig``.
        modules_to_save: other modules to train and to save with the adapter, such as a classification head.

    Raises:
        ValueError: a value out of its range; the message names the argument, the value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank of the basis."})
    alpha: float = field(default=2.0, metadata={"help": "Scale of the update."})
    num_groups: int = field(default=2, metadata={"help": "Groups of experts."})
    group_size: int = field(default=2, metadata={"help": "Experts in a group."})
    core_rank: int = field(default=2, metadata={"help": "Slices of a group's core."})
    centroid_noise: float = field(default=10.0, metadata={"help": "Noise between the first centroids."})
    init: str = field(default="kaiming", metadata={"help": "'kaiming' or 'centred'."})
    router_module: str | None = field(default=None, metadata={"help": "The adapted module that routes."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules never to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TUCKA
        for name in ("r", "num_groups", "group_size", "core_rank"):
            value = getattr(self, name)
            _check(_is_int(value) and value >= 1, f"{name} must be an integer >= 1, got {value!r}")
        _check(
            self.group_size >= 2 or self.num_groups == 1,
            f"group_size must be at least 2 where num_groups is {self.num_groups} (one score divided by its norm is "
            f"the same in every group), got {self.group_size!r}",
        )
        _check(_is_number(self.alpha) and self.alpha > 0, f"alpha must be a number > 0, got {self.alpha!r}")
        _check(
            _is_number(self.centroid_noise) and self.centroid_noise > 0,
            f"centroid_noise must be a number > 0, got {self.centroid_noise!r}",
        )
        _check(self.init in INITS, f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        _check(
            self.init != "centred" or self.core_rank >= 2,
            f"core_rank must be at least 2 where init is 'centred', got {self.core_rank!r}",
        )
        _check(
            self.router_module is None or (isinstance(self.router_module, str) and bool(self.router_module)),
            f"router_module must be None or the name of a module, got {self.router_module!r}",
        )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """The pyramid that serves a layer: one scale of 1, which fits every layer."""
        return (1,)

    def layer_parameters(self, in_features: int) -> int:
        """Trainable numbers of one layer: U ``[in, r]``, G ``[K, p, r, r]``, C ``[t, p]``."""
        cores = self.num_groups * self.core_rank * self.r**2
        return self.r * in_features + cores + self.group_size * self.core_rank

    def router_parameters(self, width: int) -> int:
        """Trainable numbers of the router, one for a model: a centroid of the router layer's input width an expert."""
        return self.num_groups * self.group_size * width
