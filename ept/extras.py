"""Name the extra to install where an import lacks a package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("ept", "ept_kernels")


@contextmanager
def train_extra(what: str) -> Iterator[None]:
    """Around the imports of ``what``: where a package is missing, say that the extra ``[train]`` brings it.

    Raises:
        ModuleNotFoundError: naming ``what``, the module that it lacks and the command that installs it. A missing
            module of this package itself is reported as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {error.name}, which is not installed: pip install 'ept-kernels[train]'", name=error.name
        ) from error
