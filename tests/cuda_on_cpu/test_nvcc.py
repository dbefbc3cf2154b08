"""What nvcc makes of the kernels: registers, spills, matrix instructions; and its library under a CPU torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_on_cpu import nvcc


@pytest.fixture(scope="session")
def compiled(shared_folder: Path, once: Callable[[str, Callable[[], object]], None]) -> Path:
    """The folder of objects, reports and the library."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the path: the CUDA kernels were not compiled for a GPU")
    folder = shared_folder / "nvcc"
    once("nvcc", lambda: nvcc.compile_all(folder))
    return folder


@pytest.mark.parametrize("source", nvcc.kernels(), ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, compiled: Path) -> None:
    """Nothing on the stack either: an array that is not in registers is slow, whatever the report calls it."""
    found = nvcc.resources((compiled / f"{source.stem}.log").read_text())
    assert {architecture for architecture, _ in found} == set(nvcc.ARCHITECTURES)
    for kernel, used in found.items():
        assert (used["stack"], used["spill stores"], used["spill loads"]) == (0, 0, 0), (kernel, used)
        # 128 threads a block: at 168 registers three blocks fit a multiprocessor.
        assert used["registers"] <= 168, (kernel, used)


@pytest.mark.parametrize("source", nvcc.kernels(), ids=lambda path: path.stem)
def test_matrix_instructions_where_they_belong(source: Path, compiled: Path) -> None:
    if (tool := nvcc.disassembler()) is None:
        pytest.skip("cuobjdump is neither on the path nor in a Triton wheel: the machine code was not read")
    found = nvcc.instructions(tool, compiled / f"{source.stem}.o")
    assert {architecture for architecture, _ in found} == set(nvcc.ARCHITECTURES)
    for (architecture, kernel), counts in found.items():
        if source.stem.endswith("tensor_cores") and architecture != "sm_75":
            assert counts["HMMA"] >= 16, (architecture, kernel)
            assert counts["LDSM"] + counts["LDS"] > 0, (architecture, kernel)
        else:
            assert counts["HMMA"] == 0, (architecture, kernel)
        assert counts["LDL"] == counts["STL"] == 0, f"{kernel} uses local memory on {architecture}"


PROGRAM = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
ept_cuda = torch.ops.ept_cuda
for name in ("delta_", "delta_backward_", "weight", "weight_backward"):
    print(getattr(ept_cuda, name).default._schema)
x, A, B, folded = torch.zeros(4, 6), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(1, 13)
calls = [
    lambda: ept_cuda.delta_(torch.zeros(4, 6), x, A, B, folded, None, [2, 3], False),
    lambda: ept_cuda.delta_(torch.zeros(4, 6), x, A[:, :2], B, folded, None, [2, 3], False),
    lambda: ept_cuda.weight(A, B, folded, 6, 6, [2, 3], None),
]
for call in calls:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        print(str(error).splitlines()[0])
"""


def test_the_library_loads_without_a_gpu_and_says_what_it_wants(compiled: Path) -> None:
    """In a process of its own: the build for a CPU registers the same operators."""
    library = str(compiled / "_cuda.so")
    result = subprocess.run([sys.executable, "-c", PROGRAM, library], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    common = "Tensor A, Tensor B, Tensor folded, "
    assert lines[:4] == [
        f"ept_cuda::delta_(Tensor(a!) y, Tensor x, {common}Tensor? groups, int[] scales, bool accumulate) -> ()",
        f"ept_cuda::delta_backward_(Tensor(a!)? grad_x, Tensor grad, Tensor x, {common}Tensor? groups, int[] scales,"
        " bool accumulate, bool need_A, bool need_B, bool need_folded) -> (Tensor, Tensor, Tensor)",
        f"ept_cuda::weight({common}int in_features, int out_features, int[] scales, Tensor? base) -> Tensor",
        f"ept_cuda::weight_backward(Tensor grad, {common}int[] scales, bool need_A, bool need_B, bool need_folded)"
        " -> (Tensor, Tensor, Tensor)",
    ]
    assert lines[4:] == [
        "A must be on a CUDA device, got [2, 3] of float32 on another type of device",
        "A must be [2, 3], got [2, 2] of float32 on another type of device",
        "A must be on a CUDA device, got [2, 3] of float32 on another type of device",
    ]


def test_the_library_says_what_it_was_compiled_for(compiled: Path) -> None:
    """``nvcc.py`` compiles the binding, which holds no kernel, for the last of its architectures alone."""
    program = "import sys; from pathlib import Path; from ept_kernels import cuda_backend as c; "
    program += "print(c.build_info(Path(sys.argv[1])))"
    result = subprocess.run([sys.executable, "-c", program, compiled / "_cuda.so"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\{'architectures': \['9\.0'\], 'compiler': 'nvcc \d+\.\d+'\}", result.stdout.strip())
