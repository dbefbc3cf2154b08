"""Compile a recorded launch for its target and read what the machine code needs and does."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from static_record import Launch, compiling_for
from static_targets import TARGETS
from triton import knobs


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel needs and does; instructions are counted as written, not as executed.

    Attributes:
        registers: of a thread. stack: bytes of local memory (scratch) of a thread. spills: registers that the compiler
            says it spilled (AMD; NVIDIA's tools show spills as local loads and stores alone).
        shared: bytes of shared memory (LDS) of a program. tensor_columns: of tensor memory.
        dots: ``tl.dot`` in the kernel's intermediate form. matrix: matrix instructions by name.
        asynchronous: copies from global to shared memory past the registers. wide_loads: global loads of 16 bytes or
            more. loads: all global loads. local: loads and stores of local memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_columns: int
    dots: int
    matrix: Mapping[str, int]
    asynchronous: int
    wide_loads: int
    loads: int
    local: int


@dataclass(frozen=True)
class Compiled:
    """A launch and its machine code, or the compiler's reason for there being none."""

    launch: Launch
    code: MachineCode | None
    error: str
    occupancy: float
    seconds: float


def compiled(launch: Launch) -> Compiled:
    """Compile ``launch``; a compiler's error is a result, since a configuration that does not compile must not ship."""
    target = TARGETS[launch.target]
    started = time.perf_counter()
    try:
        with compiling_for(target), knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # a third faster, and the code is the same
            kernel = getattr(import_module(launch.module), launch.kernel).preload(launch.specialisation)
    except Exception as error:
        return Compiled(launch, None, f"{type(error).__name__}: {error}", 0.0, time.perf_counter() - started)
    code = _amd(kernel) if target.amd else _nvidia(kernel)
    occupancy = target.occupancy(launch.config.num_warps, code.registers, code.shared, code.tensor_columns)
    return Compiled(launch, code, "", occupancy, time.perf_counter() - started)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def _by_name(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text, re.MULTILINE)
    return {name: found.count(name) for name in sorted(set(found))}


def _nvidia(kernel: Any) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(binary))
        assembly = _tool("nvdisasm", str(binary))
    needs = dict(re.findall(r"(\w+):(\d+)", usage))
    return MachineCode(
        registers=int(needs["REG"]),
        stack=int(needs["STACK"]),
        spills=0,
        shared=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
        dots=_count(r"\btt\.dot\b", kernel.asm["ttir"]),
        matrix=_by_name(r"\b(HMMA|HGMMA|IMMA|DMMA|UTC\w*MMA)\b", assembly),
        asynchronous=_count(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", assembly),
        wide_loads=_count(r"\bLDG\.\S*\b(?:128|256)\b", assembly),
        loads=_count(r"\bLDG\b", assembly),
        local=_count(r"\b(?:LDL|STL)\b", assembly),
    )


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the NVIDIA tools that come with Triton (cuobjdump looks for nvdisasm on the path)."""
    path = Path(getattr(knobs.nvidia, name).path)
    environment = {**os.environ, "PATH": f"{path.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


def _amd(kernel: Any) -> MachineCode:
    assembly = kernel.asm["amdgcn"]
    needs = dict(re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
    loads = r"^\s+(?:global|buffer)_load_\w+"
    return MachineCode(
        registers=int(needs["vgpr_count"]),
        stack=int(needs["private_segment_fixed_size"]),
        spills=int(needs["vgpr_spill_count"]),
        shared=kernel.metadata.shared,
        tensor_columns=0,
        dots=_count(r"\btt\.dot\b", kernel.asm["ttir"]),
        matrix={"MFMA": count} if (count := _count(r"^\s+v_mfma_\w+", assembly)) else {},
        asynchronous=_count(rf"{loads}\b.*\blds\b", assembly),
        wide_loads=_count(rf"{loads}x4\b", assembly),
        loads=_count(loads, assembly),
        local=_count(r"^\s+scratch_(?:load|store)\w*", assembly),
    )
