"""Old import paths of this package: they work for one version, with a ``DeprecationWarning`` that names the new one.

A module that moved gets a line in ``MOVED``; ``ept._moved`` has the table of ``ept``. Remove a line, and what it keeps
alive, one version later.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Old module -> the modules where its names are now, asked in this order.
MOVED: dict[str, tuple[str, ...]] = {}


class MovedModules(MetaPathFinder, Loader):
    """Finds old modules: each one takes its names from the new ones, when it is asked for them."""

    def __init__(self, moved: Mapping[str, tuple[str, ...]]) -> None:
        self.moved = moved

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.moved else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, self.moved[module.__name__]
        warnings.warn(
            f"{old} has moved to {' and '.join(new)}; the old path goes with the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        vars(module)["__getattr__"] = names_from(old, new)


def names_from(old: str, new: tuple[str, ...]) -> Callable[[str], Any]:
    """A module's ``__getattr__``: for the module ``old`` that moved to ``new``, or from which some names did."""

    def find(name: str) -> Any:
        for source in () if name.startswith("__") else new:
            found = importlib.import_module(source)
            if hasattr(found, name):
                return getattr(found, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


def install(moved: Mapping[str, tuple[str, ...]]) -> None:
    """Let the old paths in ``moved`` be imported; last of all finders, so that a real module comes first."""
    sys.meta_path.append(MovedModules(moved))
