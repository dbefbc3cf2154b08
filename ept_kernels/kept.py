"""``Kept``: a value beside a module that its copies do not inherit."""

from __future__ import annotations

from typing import Any


class Kept:
    """One value beside a module, in this process: copies and pickles of the module start without it.

    It is replaced, never changed, so threads may read and replace it as they please.
    """

    def __init__(self) -> None:
        self.value: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()
