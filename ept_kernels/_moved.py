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
MOVED: dict[str, tuple[str, ...]] = {
    "ept_kernels.autocast": ("ept_kernels.tracing",),
    "ept_kernels.cuda_backend": ("ept_kernels.backends.cuda", "ept_kernels.backends.cuda_library"),
    "ept_kernels.cuda_fold": ("ept_kernels.functional",),
    "ept_kernels.kept": ("ept_kernels.problem",),
    "ept_kernels.library": ("ept_kernels.backends.gpu", "ept_kernels.problem"),
    "ept_kernels.native": ("ept_kernels.backends.cpu", "ept_kernels.backends.cpu_library"),
    "ept_kernels.native_fold": ("ept_kernels.functional",),
    "ept_kernels.reference_backend": ("ept_kernels.backends.reference",),
    "ept_kernels.task_folding": ("ept_kernels.functional",),
    "ept_kernels.torch_backend": ("ept_kernels.backends.torch",),
}


class MovedModules(MetaPathFinder, Loader):
    """Finds old modules: each one takes its names from the new ones, when it is asked for them."""

    def __init__(self, moved: Mapping[str, tuple[str, ...]]) -> None:
        self.moved = moved

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.moved else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        _warn(old, self.moved[old])
        vars(module)["__getattr__"] = _names_from(old, self.moved[old], warns=False)


def _warn(what: str, new: tuple[str, ...]) -> None:
    message = f"{what} has moved to {' and '.join(new)}; the old path goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def _names_from(old: str, new: tuple[str, ...], *, warns: bool) -> Callable[[str], Any]:
    """``__getattr__`` of the module ``old``, whose names, or some of them, are in the modules ``new`` now."""

    def find(name: str) -> Any:
        for source in () if name.startswith("__") else new:
            found = importlib.import_module(source)
            if hasattr(found, name):
                if warns:
                    _warn(f"{old}.{name}", (source,))
                return getattr(found, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


def _submodules_of(package: str, moved: Mapping[str, tuple[str, ...]]) -> Callable[[str], ModuleType]:
    """``__getattr__`` of a package: ``package.old``, which nobody has imported by that path."""

    def find(name: str) -> ModuleType:
        if f"{package}.{name}" not in moved:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return find


def install(moved: Mapping[str, tuple[str, ...]]) -> None:
    """Let old paths be imported: last of all finders, so that a real module comes first.

    A module in ``moved`` that is still there, and imported by now, is asked for the names that it has lost.
    """
    sys.meta_path.append(MovedModules(moved))
    for old in moved.keys() & sys.modules.keys():
        vars(sys.modules[old])["__getattr__"] = _names_from(old, moved[old], warns=True)
    for package in {old.rpartition(".")[0] for old in moved} & sys.modules.keys():
        vars(sys.modules[package])["__getattr__"] = _submodules_of(package, moved)
