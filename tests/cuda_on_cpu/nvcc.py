"""Compiles ``csrc/cuda`` with nvcc, keeps what the assembler reports, and reads the machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from cuda_on_cpu.build import run, sources

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
_GENCODE = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in ARCHITECTURES]


def _compile(source: Path, folder: Path) -> None:
    """One object, and beside it the assembler's report."""
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-fvisibility=hidden", "-Werror", "all-warnings"]
    command = ["nvcc", *flags, "-Xptxas", "-v", *_GENCODE, "-c", source, "-o", folder / f"{source.stem}.o"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / f"{source.stem}.log").write_text(result.stderr)


def compile_all(folder: Path) -> None:
    """Every source, and the library of them."""
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: _compile(source, folder), sources()))
    objects = [folder / f"{source.stem}.o" for source in sources()]
    run(["nvcc", "-shared", "-cudart", "static", *_GENCODE, *objects, "-o", folder / "_cuda.so"])


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers and bytes of stack and spills, from the assembler's report."""
    found = {}
    for block in log.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\S+)' for '(\w+)'", block).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        registers = re.search(r"Used (\d+) registers", block).group(1)
        numbers = {"registers": registers, "stack": stack, "spill stores": stores, "spill loads": loads}
        found[architecture, name] = {what: int(number) for what, number in numbers.items()}
    return found


def disassembler() -> Path | None:
    """cuobjdump, which Triton's wheel ships beside nvdisasm."""
    found = shutil.which("cuobjdump")
    if found:
        return Path(found)
    triton = find_spec("triton")
    shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shipped if shipped is not None and shipped.exists() else None


def instructions(tool: Path, compiled: Path) -> dict[tuple[str, str], Counter]:
    """(architecture, kernel) -> how often each instruction occurs."""
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([str(tool), "-sass", str(compiled)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found: dict[tuple[str, str], Counter] = {}
    architecture = ""
    for line in result.stdout.splitlines():
        if match := re.match(r"\s*arch = (\w+)|\s*code for (\w+)", line):
            architecture = match.group(1) or match.group(2)
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = found[architecture, match.group(1)] = Counter()
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", line):
            counts[match.group(1)] += 1
    return found
