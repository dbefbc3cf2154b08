"""One pyramid for every layer, said the way that ``EPTConfig`` takes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

Sizes = tuple[int, ...]


def shared_and_pattern(sizes: Mapping[str, Sizes]) -> tuple[Sizes, dict[str, Sizes] | None]:
    """``kernel_sizes`` (the commonest) and ``kernel_pattern`` (None if all agree) for kernel sizes by layer's name."""
    ((commonest, _),) = Counter(sizes.values()).most_common(1)
    # Anchored, or a layer "block.0.q" would speak for another's "decoder.block.0.q".
    different = {f"^{re.escape(name)}": own for name, own in sizes.items() if own != commonest}
    return commonest, different or None
