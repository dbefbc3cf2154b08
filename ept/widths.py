"""The width of a model, told by the layers that an adapter takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def commonest_width(features: Mapping[str, tuple[int, int]]) -> int:
    """The commonest input width among ``(in, out)`` of the targets; the smaller one where two are equally common."""
    widths = Counter(width for width, _ in features.values())
    return min(widths, key=lambda width: (-widths[width], width))
