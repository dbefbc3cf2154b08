"""How often would a layer compile, over many batches? Run as a program, it prints a count for each kernel.

A process of its own, because tests elsewhere interpret kernels, and one process does not mix that with compiling.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable

import torch
from record import Call, record
from targets import TARGETS

from ept_kernels import PyramidGeometry
from ept_kernels.problem import Base, Problem, Routing
from ept_kernels.triton import backend
from ept_kernels.triton.fold_backward import fold_backward
from ept_kernels.triton.fold_forward import fold as fold_forward

SCALES = (2, 4, 6, 8)
#: One row, primes, powers of two and their neighbours, multiples of 16 and others.
LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 61, 64, 65, 100, 127, 128, 144, 200, 251, 256, 400, 509, 512, 777)
LENGTHS += (1000, 1009, 1024, 1500, 2000, 2039, 2048, 3000, 3072, 4000, 4096, 4099, 5000, 6144, 8000, 8191, 8192, 9000)
SAMPLES = (1, 2, 5, 16)


def layer(samples: int, length: int, by_row: bool, backward: bool) -> Callable[[], None]:
    """A pass of a 768 x 768 layer over ``samples`` samples of ``length`` rows, a group for each of them (or a row)."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def start() -> None:
        rows = samples * length
        x, weight = meta(rows, 768), meta(768, 768)
        A, B = meta(8, 384, dtype=torch.float32), meta(384, 8, dtype=torch.float32)
        folded = meta(samples, sum(k * k for k in SCALES), dtype=torch.float32)
        active = meta(samples, len(SCALES), dtype=torch.bool)
        groups = meta(rows if by_row else samples, dtype=torch.int64)
        problem = Problem(x, A, B, folded, groups, active, 768, SCALES)
        if backward:
            backend.backward(x, problem, weight, (True,) * 4)
        else:
            backend.forward(problem, Base(weight, None))

    return start


def fold(tasks: int, several: bool, backward: bool) -> Callable[[], None]:
    """A pass of the router and the fold: ``tasks`` of them in a tensor, or the one of that number, of 50."""
    geometry = PyramidGeometry(768, 768, 8, SCALES + SCALES)

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def start() -> None:
        ids = meta(tasks, dtype=torch.int64) if several else tasks
        kernels = tuple(meta(k, k) for k in geometry.kernel_sizes)
        routing = Routing(meta(8, 768), meta(50, 768), ids, kernels, 2, 4.0, geometry)
        if backward:
            count, numbers = tasks if several else 1, sum(k * k for k in geometry.kernel_sizes)
            saved = (meta(numbers), meta(count, 8), None)
            fold_backward(routing, meta(count, geometry.folded_size), saved, [True] * 10)
        else:
            fold_forward(routing, True)

    return start


def main() -> None:
    os.environ["EPT_GPU_PLAN"] = "fused"  # the small kernels, and the one of the products
    compiled, needed = defaultdict(int), defaultdict(set)
    for backward in (False, True):
        calls = {
            Call(f"{samples} x {length}, {'rows' if by_row else 'samples'}"): layer(samples, length, by_row, backward)
            for samples in SAMPLES
            for length in LENGTHS
            for by_row in (False, True)
        }
        calls |= {
            Call(f"{'tasks' if several else 'task'} {tasks}"): fold(tasks, several, backward)
            for tasks in range(1, 50)
            for several in (False, True)
        }
        for launch in record(TARGETS["sm_90"], "bf16", calls):
            which = f"{launch.kernel}, {'backward' if backward else 'forward'}"
            compiled[which] += 1
            needed[which].add((launch.config, launch.variant))
    print(json.dumps({which: [count, len(needed[which])] for which, count in compiled.items()}))


if __name__ == "__main__":
    main()
