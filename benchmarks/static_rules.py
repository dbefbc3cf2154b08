"""What a shipped configuration must satisfy, from its machine code alone.

- It compiles; nothing spills and no thread has local memory.
- Registers, shared memory and tensor memory are within the target's limits.
- A kernel made of matrix products executes matrix instructions (fp32 as well: as TF32 on NVIDIA, directly on AMD).
- A kernel that streams rows loads them asynchronously, or 16 bytes a thread, where rows are contiguous and aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from static_compile import Compiled
from static_record import Launch
from static_targets import TARGETS


@dataclass(frozen=True)
class Expectation:
    """What a launch of a kernel is made of. ``matrix``: of ``tl.dot``. ``streams``: of loads of rows."""

    matrix: Callable[[Launch], bool]
    streams: Callable[[Launch], bool]


def _always(launch: Launch) -> bool:
    return True


def _never(launch: Launch) -> bool:
    return False


def _accumulates(launch: Launch) -> bool:
    return "accumulate" in launch.variant


def _sums_factors(launch: Launch) -> bool:
    """Not the folded kernels' first stage alone."""
    return not ("no x" in launch.variant and "no dy" in launch.variant)


#: Every kernel must be listed, so that a new one is not waved through.
EXPECTATIONS = {
    "shrink_kernel": Expectation(matrix=_always, streams=_always),
    "expand_kernel": Expectation(matrix=_always, streams=_accumulates),
    "single_kernel": Expectation(matrix=_always, streams=_always),
    "linear_kernel": Expectation(matrix=_always, streams=_always),
    "factor_grad_kernel": Expectation(matrix=_sums_factors, streams=_sums_factors),
    "weight_kernel": Expectation(matrix=_always, streams=_never),
    "weight_grad_kernel": Expectation(matrix=_always, streams=_never),
    "reduce_kernel": Expectation(matrix=_never, streams=_never),
    "fold_kernel": Expectation(matrix=_never, streams=_never),
    "logits_grad_kernel": Expectation(matrix=_never, streams=_never),
    "fold_grad_kernel": Expectation(matrix=_never, streams=_never),
}


def violations(result: Compiled) -> list[str]:
    """Everything that is wrong with a compiled launch; nothing if it may ship."""
    launch, code = result.launch, result.code
    if code is None:
        return [f"does not compile: {result.error.strip().splitlines()[-1]}"]
    target, warps = TARGETS[launch.target], launch.config.num_warps
    wrong = []
    if code.spills or code.stack or code.local:
        wrong.append(
            f"spills: {code.stack} bytes of stack, {code.local} local accesses, {code.spills} spilled registers"
        )
    if code.registers > target.thread_registers:
        wrong.append(f"{code.registers} registers a thread, {target.thread_registers} exist")
    if code.shared > target.shared:
        wrong.append(f"{code.shared} bytes of shared memory, a program may have {target.shared}")
    if code.tensor_columns > target.tensor_columns:
        wrong.append(f"{code.tensor_columns} columns of tensor memory, {target.tensor_columns} exist")
    if not wrong and result.occupancy == 0:
        wrong.append(f"a program of {warps} warps with {code.registers} registers a thread cannot be resident")
    expected = EXPECTATIONS.get(launch.kernel)
    if expected is None:
        return [*wrong, "the kernel is missing from EXPECTATIONS in benchmarks/static_rules.py"]
    if (expected.matrix(launch) or code.dots) and not code.matrix:
        wrong.append("no matrix instruction")
    if launch.call.wide and expected.streams(launch) and not (code.asynchronous or code.wide_loads):
        wrong.append(f"rows are read by narrow loads ({code.loads} loads, none asynchronous or of 16 bytes)")
    return wrong
