"""What nvcc makes of the kernels: registers, spills, local memory; and what its library needs and gives."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_on_cpu import nvcc
from cuda_on_cpu.build import sources

from ept_kernels.backends.cuda_library import FUNCTIONS


@pytest.fixture(scope="session")
def compiled(shared_folder: Path, once: Callable[[str, Callable[[], object]], None]) -> Path:
    """The folder of objects, reports and the library."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the path: the CUDA kernels were not compiled for a GPU")
    folder = shared_folder / "nvcc"
    once("nvcc", lambda: nvcc.compile_all(folder))
    return folder


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, compiled: Path) -> None:
    """Nothing on the stack either: an array that is not in registers is slow, whatever the report calls it."""
    found = nvcc.resources((compiled / f"{source.stem}.log").read_text())
    assert {architecture for architecture, _ in found} == set(nvcc.ARCHITECTURES)
    for kernel, used in found.items():
        assert (used["stack"], used["spill stores"], used["spill loads"]) == (0, 0, 0), (kernel, used)
        # 128 threads a block: at 80 registers six blocks fit a multiprocessor, and hide each other's waiting.
        assert used["registers"] <= 80, (kernel, used)


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_no_kernel_uses_local_memory(source: Path, compiled: Path) -> None:
    if (tool := nvcc.disassembler()) is None:
        pytest.skip("cuobjdump is neither on the path nor in a Triton wheel: the machine code was not read")
    found = nvcc.instructions(tool, compiled / f"{source.stem}.o")
    assert {architecture for architecture, _ in found} == set(nvcc.ARCHITECTURES)
    for (architecture, kernel), counts in found.items():
        assert counts["EXIT"] > 0, f"{kernel} was not read"
        assert counts["LDL"] == counts["STL"] == 0, f"{kernel} uses local memory on {architecture}"


def test_the_library_needs_neither_torch_nor_python_nor_a_cuda_runtime(compiled: Path) -> None:
    """So that one build serves all of them; the driver's own library comes when a kernel is first launched."""
    dynamic = subprocess.run(
        ["readelf", "-d", compiled / "_cuda.so"], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed
    assert not [library for library in needed if re.search("torch|python|c10|cuda", library)]
    symbols = subprocess.run(["nm", "-D", "--defined-only", compiled / "_cuda.so"], capture_output=True, text=True)
    exported = {line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-1].startswith("ept_")}
    assert exported == {*FUNCTIONS, "ept_sizes", "ept_probe", "ept_error_name", "ept_error_text", "ept_build_info"}


PROGRAM = """
import sys
from pathlib import Path
from ept_kernels.backends import cuda_library
print(cuda_library.build_info(Path(sys.argv[1])))
print(cuda_library._open(Path(sys.argv[1])).ept_probe() != 0)
import torch
print(torch.cuda.is_initialized())
"""


def test_the_library_loads_without_a_gpu_and_says_what_it_is(compiled: Path) -> None:
    """In a process of its own. Without a driver the probe reports an error, and does not crash."""
    program = PROGRAM if shutil.which("nvidia-smi") is None else PROGRAM.replace("!= 0", "== 0")
    result = subprocess.run([sys.executable, "-c", program, compiled / "_cuda.so"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    info, probed, initialised = result.stdout.splitlines()
    assert re.fullmatch(r"\{'architectures': \['7\.5', '8\.0', '9\.0'\], 'compiler': 'nvcc \d+\.\d+'\}", info)
    assert (probed, initialised) == ("True", "False")
