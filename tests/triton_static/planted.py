"""Kernels and tiles that the static check must refuse, and innocent twins. Run as a program, it prints its verdicts.

A process of its own, because tests elsewhere interpret kernels, and one process does not mix that with compiling.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from ept_kernels.triton.plan import plan_for
from static_compile import compiled
from static_record import Call, record
from static_rules import EXPECTATIONS, Expectation, violations
from static_targets import TARGETS

from ept_kernels.triton import linear as linear_module
from ept_kernels.triton.launch import Config, launch


@triton.jit
def product(x_ptr, y_ptr, STEP: tl.constexpr, DOT: tl.constexpr, BLOCK: tl.constexpr):
    """y = x x^T (``DOT``) or row sums, x read along rows that are contiguous (``STEP`` 1) or not."""
    line, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + line * BLOCK * STEP + column * STEP)
    if DOT:
        tl.store(y_ptr + line * BLOCK + column, tl.dot(x, tl.trans(x)).to(x.dtype))
    else:
        tl.store(y_ptr + tl.arange(0, BLOCK), tl.sum(x.to(tl.float32), 1).to(x.dtype))


@triton.jit
def unlisted(y_ptr):
    """Not in EXPECTATIONS."""
    tl.store(y_ptr, 1.0)


@triton.jit
def refused(y_ptr):
    """Does not compile."""
    tl.static_assert(False, "planted")


def rows(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def product_with(*, step: int, dot: bool) -> None:
    config = Config.of(BLOCK=64, num_warps=4)
    launch(product, (1,), rows(64, 64 * step), rows(64, 64), config=config, STEP=step, DOT=dot)


def linear_with(**config: int) -> None:
    plan = plan_for(8, (2, 4, 6, 8))
    tiles = Config.of(GROUP_T=8, **config)
    with mock.patch.object(linear_module, "linear_candidates", return_value=[tiles]):
        linear_module.linear(
            rows(1024, 1024),
            rows(1024, 1024),
            None,
            rows(1024, plan.width),
            torch.empty(plan.rank_blocks, 1024, dtype=torch.int32, device="meta"),
            torch.empty(8, 512, device="meta"),
            plan,
        )


PLANTED: dict[str, tuple[str, Callable[[], None]]] = {
    "innocent": ("sm_80", lambda: product_with(step=1, dot=True)),
    "innocent on AMD": ("gfx942", lambda: product_with(step=1, dot=True)),
    "no dot": ("sm_80", lambda: product_with(step=1, dot=False)),
    "narrow loads": ("sm_90", lambda: product_with(step=3, dot=True)),
    "narrow loads on AMD": ("gfx942", lambda: product_with(step=3, dot=True)),
    "unlisted": ("sm_80", lambda: launch(unlisted, (1,), rows(1), config=Config.of())),
    "refused": ("sm_80", lambda: launch(refused, (1,), rows(1), config=Config.of())),
    "spill": ("sm_90", lambda: linear_with(BLOCK_T=128, BLOCK_C=256, BLOCK_I=32, num_warps=4, num_stages=2)),
    "shared memory": ("gfx942", lambda: linear_with(BLOCK_T=128, BLOCK_C=128, BLOCK_I=64, num_warps=8, num_stages=5)),
}


def main() -> None:
    EXPECTATIONS["product"] = Expectation(matrix=lambda launch: True, streams=lambda launch: True)
    verdicts = {}
    for name, (target, start) in PLANTED.items():
        (recorded,) = record(TARGETS[target], "bf16", {Call(name, True): start})
        verdicts[name] = violations(compiled(recorded))
    print(json.dumps(verdicts))


if __name__ == "__main__":
    sys.modules["planted"] = sys.modules["__main__"]
    main()
