"""Which extra of the package brings what an import lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("ept", "ept_kernels")


@contextmanager
def train_extra(what: str) -> Iterator[None]:
    """Around the imports of ``what``: a third party's module that is missing becomes a call for ``[train]``.

    Raises:
        ModuleNotFoundError: naming ``what``, the module that it lacks and the command that installs it. One of this
            package's own modules is no matter of extras and is reported as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        raise ModuleNotFoundError(
            f"{what} needs {error.name}, which is not installed: pip install 'ept-kernels[train]'", name=error.name
        ) from error
