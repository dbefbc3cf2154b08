"""Compile a recorded launch for its target and read what the machine code needs and does."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Launch
from targets import TARGETS
from triton import knobs


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel needs and does; instructions are counted as written, not as executed.

    Attributes:
        registers: of a thread. stack: bytes of local memory (scratch) of a thread. spills: bytes (AMD: registers) that
            the compiler says it spilled.
        shared: bytes of shared memory (LDS) of a program. tensor_columns: of tensor memory.
        dots: ``tl.dot`` in the kernel's intermediate form. matrix: matrix instructions by name.
        asynchronous: copies from global to shared memory past the registers. wide_loads: global loads of 16 bytes or
            more. loads: all global loads. local: loads and stores of local memory.
        warnings: what ptxas warns of, such as serialised matrix instructions (C7515).
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
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """A launch and its machine code, or the compiler's reason for there being none."""

    launch: Launch
    code: MachineCode | None
    error: str = ""

    @property
    def occupancy(self) -> float:
        """Resident share of a processor's warps that registers and shared memory allow."""
        if self.code is None:
            return 0.0
        target, code = TARGETS[self.launch.target], self.code
        return target.occupancy(self.launch.config.num_warps, code.registers, code.shared, code.tensor_columns)


def compiled(launch: Launch) -> Compiled:
    """Compile ``launch``; a compiler's error is a result, since a configuration that does not compile must not ship."""
    try:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # a third faster, and the code is the same
            kernel = launch.compile()
    except Exception as error:
        return Compiled(launch, None, f"{type(error).__name__}: {error}")
    return Compiled(launch, _amd(kernel) if TARGETS[launch.target].amd else _nvidia(kernel))


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def _by_name(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text, re.MULTILINE)
    return {name: found.count(name) for name in sorted(set(found))}


def warnings(log: str) -> tuple[str, ...]:
    """The numbered remarks of ptxas, each once: all of them tell of slow or doubtful code."""
    return tuple(sorted({line.strip() for line in re.findall(r"\(C\d+\).*", log)}))


def _nvidia(kernel: Any) -> MachineCode:
    ptx = kernel.asm["ptx"]
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    blackwell = re.search(r"\d+", architecture)[0] >= "100" and len(re.search(r"\d+", architecture)[0]) > 2
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        binary.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(binary))
        assembly = _tool("nvdisasm", str(binary))
        ptxas = "ptxas_blackwell" if blackwell and hasattr(knobs.nvidia, "ptxas_blackwell") else "ptxas"
        log = _tool(ptxas, "-v", "--gpu-name", architecture, str(source), "-o", f"{folder}/again.cubin")
    needs = dict(re.findall(r"(\w+):(\d+)", usage))
    return MachineCode(
        registers=int(needs["REG"]),
        stack=int(needs["STACK"]),
        spills=sum(int(number) for number in re.findall(r"(\d+) bytes spill", log)),
        shared=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
        dots=_count(r"\btt\.dot\b", kernel.asm["ttir"]),
        matrix=_by_name(r"\b(HMMA|HGMMA|IMMA|DMMA|UTC\w*MMA)\b", assembly),
        asynchronous=_count(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", assembly),
        wide_loads=_count(r"\bLDG\.\S*\b(?:128|256)\b", assembly),
        loads=_count(r"\bLDG\b", assembly),
        local=_count(r"\b(?:LDL|STL)\b", assembly),
        warnings=warnings(log),
    )


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the NVIDIA tools that come with Triton (cuobjdump looks for nvdisasm on the path)."""
    path = Path(getattr(knobs.nvidia, name).path)
    environment = {**os.environ, "PATH": f"{path.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


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
