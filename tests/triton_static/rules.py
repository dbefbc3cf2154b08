"""What a shipped configuration must satisfy, from its machine code alone.

- It compiles; nothing spills and no thread has local memory; ptxas has nothing to warn of.
- Registers, shared memory and tensor memory are within the target's limits.
- A product executes matrix instructions: on compute capability 9.0 the asynchronous ones, where tiles have the 64 rows
  that these take.
- Where rows are contiguous and aligned, a kernel that streams them loads them asynchronously, or 16 bytes a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from compiling import Compiled
from targets import TARGETS


@dataclass(frozen=True)
class Expectation:
    """What a kernel is made of. ``product``: of ``tl.dot``. ``streams``: of loads of rows."""

    product: bool = False
    streams: bool = False


#: Every kernel must be listed, so that a new one is not waved through.
EXPECTATIONS = {
    "fused_kernel": Expectation(product=True, streams=True),
    "dropout_kernel": Expectation(streams=True),
    "interleave_kernel": Expectation(),
    "gather_kernel": Expectation(),
    "core_kernel": Expectation(),
    "kernel_grad_kernel": Expectation(),
    "fold_kernel": Expectation(),
    "logits_grad_kernel": Expectation(),
    "fold_grad_kernel": Expectation(),
}


def violations(result: Compiled) -> list[str]:
    """Everything that is wrong with a compiled launch; nothing if it may ship."""
    launch, code = result.launch, result.code
    if code is None:
        return [f"does not compile: {result.error.strip().splitlines()[-1]}"]
    target, warps = TARGETS[launch.target], launch.config.num_warps
    wrong = list(code.warnings)
    if code.spills or code.stack or code.local:
        wrong.append(f"spills: {code.stack} bytes of stack, {code.local} local accesses, {code.spills} spilled")
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
        return [*wrong, "the kernel is missing from EXPECTATIONS in tests/triton_static/rules.py"]
    if (expected.product or code.dots) and not code.matrix:
        wrong.append("no matrix instruction")
    rows = dict(launch.config.tiles).get("BLOCK_T", 0)
    if expected.product and launch.target == "sm_90" and rows >= 64 and "HGMMA" not in code.matrix:
        wrong.append(f"no HGMMA, though a tile has {rows} rows: {dict(code.matrix)}")
    wide, narrow = code.asynchronous + code.wide_loads, code.loads - code.wide_loads
    if launch.call.wide and expected.streams and narrow > wide:
        wrong.append(f"narrow loads: {narrow}, and {wide} asynchronous or of 16 bytes")
    return wrong
