"""Which tasks a caller asked for."""

from __future__ import annotations

from collections.abc import Sequence

from ept.data.spec import DataError


def select(tasks: Sequence[str] | None, available: Sequence[str], source: str) -> list[str]:
    """The requested task names, in the order asked for; None means all that are available.

    Raises:
        DataError: a bare string instead of a list, no name, a name twice, or a name that ``source`` does not have.
    """
    if tasks is None:
        return list(available)
    if isinstance(tasks, str):
        raise DataError(f"tasks is the string {tasks!r}; give a list of names, e.g. [{tasks!r}]")
    if not tasks:
        raise DataError(f"tasks is empty; name at least one of: {', '.join(available)} (None means all)")
    repeated = sorted({name for name in tasks if list(tasks).count(name) > 1})
    if repeated:
        raise DataError(f"tasks names {', '.join(repeated)} more than once")
    unknown = [name for name in tasks if name not in available]
    if unknown:
        raise DataError(f"unknown task {', '.join(map(repr, unknown))}; {source} has: {', '.join(available)}")
    return list(tasks)
