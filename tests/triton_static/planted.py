"""Kernels and tiles that the static check must refuse, and innocent twins. Run as a program, it prints its verdicts.

A process of its own, because tests elsewhere interpret kernels, and one process does not mix that with compiling.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from compiling import compiled
from record import Call, record
from rules import EXPECTATIONS, Expectation, violations
from targets import TARGETS

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
def multiply(total, x_ptr, inner, BLOCK_T: tl.constexpr):
    """``total`` and the product of a tile's rows with themselves."""
    t, i = tl.arange(0, BLOCK_T), tl.arange(0, 64)
    left, right = x_ptr + t[:, None] * 4096 + i[None, :], x_ptr + i[:, None] + t[None, :] * 4096
    for start in range(0, inner, 64):
        mask = i < inner - start
        total = tl.dot(tl.load(left, mask[None, :], 0.0), tl.load(right, mask[:, None], 0.0), total)
        left += 64
        right += 64
    return total


@triton.jit
def two_loops(x_ptr, y_ptr, inner, SHORT_LAST: tl.constexpr, BLOCK_T: tl.constexpr):
    """Two products into one accumulator; their order decides whether ptxas serialises them (Triton 3.6)."""
    total = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    if SHORT_LAST:
        total = multiply(total, x_ptr, inner, BLOCK_T)
        total = multiply(total, x_ptr + 2048, 160, BLOCK_T)
    else:
        total = multiply(total, x_ptr + 2048, 160, BLOCK_T)
        total = multiply(total, x_ptr, inner, BLOCK_T)
    t = tl.arange(0, BLOCK_T)
    tl.store(y_ptr + t[:, None] * BLOCK_T + t[None, :], total.to(tl.bfloat16))


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


def loops_with(*, short_last: bool, block: int = 128, warps: int = 8, stages: int = 3) -> None:
    config = Config.of(BLOCK_T=block, num_warps=warps, num_stages=stages)
    launch(two_loops, (1,), rows(block, 4096), rows(block, block), 2048, config=config, SHORT_LAST=short_last)


PLANTED: dict[str, tuple[str, Callable[[], None]]] = {
    "innocent": ("sm_80", lambda: product_with(step=1, dot=True)),
    "innocent on AMD": ("gfx942", lambda: product_with(step=1, dot=True)),
    "no dot": ("sm_80", lambda: product_with(step=1, dot=False)),
    "narrow loads": ("sm_90", lambda: product_with(step=3, dot=True)),
    "narrow loads on AMD": ("gfx942", lambda: product_with(step=3, dot=True)),
    "unlisted": ("sm_80", lambda: launch(unlisted, (1,), rows(1), config=Config.of())),
    "refused": ("sm_80", lambda: launch(refused, (1,), rows(1), config=Config.of())),
    "innocent loops": ("sm_90", lambda: loops_with(short_last=False)),
    "loops": ("sm_90", lambda: loops_with(short_last=True)),
    "spill": ("sm_90", lambda: loops_with(short_last=False, block=256, warps=4, stages=2)),
    "shared memory": ("gfx942", lambda: loops_with(short_last=False, stages=5)),
}


def main(names: list[str]) -> None:
    EXPECTATIONS["product"] = EXPECTATIONS["two_loops"] = Expectation(product=True, streams=True)
    verdicts = {}
    for name in names or PLANTED:
        target, start = PLANTED[name]
        (recorded,) = record(TARGETS[target], "bf16", {Call(name): start})
        verdicts[name] = violations(compiled(recorded))
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
