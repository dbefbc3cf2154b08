"""Modules of this package learn what they become a part of, by a hook that torch calls wherever a submodule is set."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


def _announce(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    announced = getattr(type(child), "became_part", None)
    if announced is not None:
        announced(child, parent, name)


def watch_registrations() -> None:
    """Call ``child.became_part(parent, name)``, where a child has that, before it is made a part of ``parent``."""
    register_module_module_registration_hook(_announce)
