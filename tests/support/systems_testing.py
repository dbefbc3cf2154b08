"""Every system of ``--method`` in a size for toy models, for tests that go through them all."""

from __future__ import annotations

from typing import Any

#: Options of ``System.make_config``, by name.
SMALL: dict[str, dict[str, Any]] = {
    "ept": {"r": 2, "kernel_sizes": (1, 2, 2)},
    "lora": {"r": 2},
    "more": {"r": 2},
    "moelora": {"r": 4, "num_experts": 2},
    "mixlora": {"r": 2, "num_experts": 3},
    "dcft": {"kernel_size": 2},
    "tucka": {"r": 2},
}
