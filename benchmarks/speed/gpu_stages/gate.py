"""Is every way to compute the layer right? Against float64, from poisoned memory, twice, and in a CUDA graph.

An error may be 1e-5 in fp32, and in half precision twice that of plain torch with dense updates in the same dtype.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from harness import forced_backend
from torch import Tensor

from ept_kernels.doctor import FP32_LIMIT, NAMES, OVER_PLAIN_TORCH, relative_errors

from .bench import Bench
from .tensors import DTYPES, Layer, build, ways

#: (in, out, samples, rows of a sample, groups), the most telling first.
LAYERS = {
    "llama2-7b q": (4096, 4096, 4, 150, 3),
    "t5-base q": (768, 768, 4, 150, 3),
    "few rows": (4096, 4096, 16, 1, 4),
    "one task": (4096, 4096, 8, 64, 1),
    "llama2-7b up": (4096, 11008, 4, 150, 2),
    "llama2-7b down": (11008, 4096, 4, 150, 2),
    "t5-base wi": (768, 3072, 4, 150, 3),
    "t5-base wo": (3072, 768, 4, 150, 3),
}
REPEATS = 3


def run(bench: Bench) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoning turns torch's determinism on
    layers = list(LAYERS.items())[: 2 if bench.dry else None]
    for dtype_name, dtype in DTYPES.items():
        for name, (width, height, samples, length, groups) in layers:
            if bench.left < 5:
                bench.emit(what="gate", layer=name, dtype=dtype_name, skipped="no time left")
                continue
            width, height = bench.size(width, height)
            length = min(length, 4) if bench.dry else length
            layer = build(bench.device, dtype, width, height, samples, length, groups)
            with bench.attempt(what="gate", layer=name, dtype=dtype_name):
                _judge(bench, layer, dtype, {"layer": name, "dtype": dtype_name})


def _judge(bench: Bench, layer: Layer, dtype: torch.dtype, labels: dict[str, str]) -> None:
    exact = layer.evaluate(layer.definition, layer.leaves(torch.float64))
    limits = [FP32_LIMIT] * len(exact)
    if dtype != torch.float32:
        plain = relative_errors(layer.evaluate(layer.definition, layer.leaves()), exact)
        limits = [OVER_PLAIN_TORCH * error for error in plain]
    served = ways(bench.device, dtype)
    if bench.dry and labels != {"layer": next(iter(LAYERS)), "dtype": "fp32"}:
        served = [way for way in served if "triton" not in way]  # its interpreter takes seconds for a call
    for way in served:
        if bench.left < 3:
            return
        with bench.attempt(what="gate", way=way, **labels), forced_backend(way):
            leaves = layer.leaves()
            with poisoned_memory():
                found = layer.evaluate(layer.forward, leaves)
            errors = relative_errors(found, exact)
            worst = max(range(len(errors)), key=lambda i: errors[i] / limits[i])
            again = [layer.evaluate(layer.forward, leaves) for _ in range(1 if bench.dry else REPEATS)]
            same = all(_identical(again[0], values) for values in again[1:])
            replayed = again[0] if bench.dry else _replay(bench, layer, leaves)
            checks = {
                "accurate": errors[worst] <= limits[worst],
                "deterministic": same,
                "graph": _identical(replayed, again[0]),
            }
            bench.emit(
                what="gate",
                way=way,
                **labels,
                right=all(checks.values()),
                **checks,
                tensor=NAMES[worst],
                error=None if checks["accurate"] else f"error of {NAMES[worst]} is {errors[worst]:.2e}",
                found=errors[worst],
                limit=limits[worst],
            )


def _replay(bench: Bench, layer: Layer, leaves: list[Tensor]) -> list[Tensor]:
    """Output and gradients as a replayed graph writes them."""
    results: list[list[Tensor]] = []
    replay = bench.graphed(lambda: results.append(layer.evaluate(layer.forward, leaves)))
    replay()
    return results[-1]


def _identical(found: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin hold NaN, so that a forgotten element shows."""
    before, filled = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled
