"""Old import paths of this package, see ``ept_kernels._moved``."""

from __future__ import annotations

#: Old module -> the modules where its names are now, asked in this order.
MOVED: dict[str, tuple[str, ...]] = {}
