"""What the fuzzing tests share: how many examples, and what may come of one."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from pyramid_testing import examples

import ept

#: ``make fuzz`` multiplies the number of examples of every test.
FACTOR = int(os.environ.get("EPT_FUZZ_FACTOR", "1"))

#: A small config of every layer class.
LAYERS = {
    ept.EPTLinear: ept.EPTConfig(r=2, kernel_sizes=(2, 3, 5), num_tasks=3),
    ept.MOELoRALinear: ept.MOELoRAConfig(r=4, num_experts=2, num_tasks=3),
    ept.MoRELinear: ept.MoREConfig(r=3, num_tasks=3),
    ept.DCFTLinear: ept.DCFTConfig(kernel_size=3, num_tasks=3),
    ept.MixLoRALinear: ept.MixLoRAConfig(r=2, num_experts=3, num_tasks=3),
    ept.TuckALinear: ept.TuckAConfig(r=2, num_tasks=3),
}

#: ``{category: {outcome: examples}}``, for the summary.
COUNTED: dict[str, Counter[str]] = defaultdict(Counter)

#: Values of right and wrong types and sizes, as a careless caller or a damaged file would have them.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 2**16 + 1, 10**9, 10**30, 10**400, -(10**400)),
    *(0.5, 1.5, 1e-320, 1e-30, 1e38, 1e308, float("nan"), float("inf"), -float("inf"), 3 + 4j),
    *("", "a", "auto", "(", "all-linear", "../../x", "\0", b"x", "é" * 50),
    *([], [1], ["a"], ["a", "a"], [None], [["q"]], [{}], {}, {"a": 1}, {"a": (2, 2)}, {"(": [2, 2]}, {5: [2, 2]}),
    *((2, 2), (2, 4, 4), (2, 2.0), (2, True), (0,), (3, 10**30), range(3), {"x"}, {1}, object(), len),
)


def many(count: int) -> settings:
    """Settings of a test with ``count`` examples in CI."""
    return examples(count * FACTOR)


def outcome(category: str, action: Callable[[], Any], allowed: tuple[type[Exception], ...], *names: str) -> Any:
    """What ``action`` gives; None where it refuses with an error of a kind in ``allowed`` that holds one of ``names``.

    Without names, any message will do that is not empty.
    """
    try:
        result = action()
    except allowed as error:
        refusal = error
    else:
        COUNTED[category]["served"] += 1
        return result
    text = str(refusal)
    named = any(name in text for name in names) if names else bool(text)
    assert named, f"{type(refusal).__name__} names nothing: {text}"
    COUNTED[category]["refused"] += 1
    return None
