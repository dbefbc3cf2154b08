"""What the native build makes, leaves out, and refuses; the built module itself is tested in ``tests/kernels``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CSRC = REPOSITORY / "csrc"
_BESIDE = str(Path(sys.executable).parent)


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_BESIDE)


needs_cmake = pytest.mark.skipif(_tool("cmake") is None, reason="cmake is not installed")
needs_compiler = pytest.mark.skipif(
    _tool("cmake") is None or not (shutil.which("g++") or shutil.which("clang++")),
    reason="cmake or a C++ compiler is not installed",
)


def environment(**chosen: str) -> dict[str, str]:
    """This process's, but for what steers the build; ``chosen`` is added."""
    steering = ("EPT_BUILD_CPU", "EPT_BUILD_CUDA", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    return {name: value for name, value in os.environ.items() if name not in steering} | chosen


def configured(folder: Path, **chosen: str) -> subprocess.CompletedProcess[str]:
    """What CMake says of this repository."""
    command = [_tool("cmake"), "-S", str(REPOSITORY), "-B", str(folder), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    if ninja := _tool("ninja"):
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**chosen))


def one_line(text: str) -> str:
    """CMake wraps its errors."""
    return " ".join(text.split())


@needs_cmake
@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"], ids=["absent", "useless"])
def test_without_a_compiler_the_cpu_kernels_are_left_out(compiler: str, tmp_path: Path) -> None:
    done = configured(tmp_path, CXX=compiler, EPT_BUILD_CUDA="0")
    reason = f"the C++ compiler does not work: CXX={compiler}"
    assert done.returncode == 0, done.stderr
    assert f"the CPU kernels are left out: {reason}" in done.stderr
    assert (tmp_path / "modules.txt").read_text().split() == []
    done = configured(tmp_path, CXX=compiler, EPT_BUILD_CPU="1", EPT_BUILD_CUDA="0")
    assert done.returncode != 0
    assert f"EPT_BUILD_CPU=1, but: {reason}" in one_line(done.stderr)


@needs_cmake
def test_without_nvcc_the_cuda_kernels_are_left_out(tmp_path: Path) -> None:
    done = configured(tmp_path, EPT_BUILD_CPU="0", PATH=os.defpath)
    assert done.returncode == 0, done.stderr
    assert "the CPU kernels are left out: EPT_BUILD_CPU=0" in done.stderr
    assert "the CUDA kernels are left out: nvcc was not found" in done.stderr
    done = configured(tmp_path, EPT_BUILD_CPU="0", EPT_BUILD_CUDA="1", PATH=os.defpath)
    assert done.returncode != 0
    assert "EPT_BUILD_CUDA=1, but: nvcc was not found" in one_line(done.stderr)


@needs_cmake
@pytest.mark.parametrize(
    ("asked", "architectures"),
    [
        (None, "80-real;90"),
        ("8.0;9.0+PTX", "80-real;90"),
        ("8.0 9.0 +PTX", "80-real;90"),
        ("9.0a 12.0", "90a-real;120-real"),
    ],
)
def test_cuda_architectures(asked: str | None, architectures: str, tmp_path: Path) -> None:
    chosen = {} if asked is None else {"TORCH_CUDA_ARCH_LIST": asked}
    done = configured(tmp_path, EPT_BUILD_CPU="0", CUDACXX="false", **chosen)
    assert f"CUDA architectures: {architectures}\n" in done.stdout
    assert "the CUDA kernels are left out: nvcc does not work: false" in one_line(done.stderr)


@needs_cmake
def test_what_is_no_architecture_is_refused(tmp_path: Path) -> None:
    done = configured(tmp_path, EPT_BUILD_CPU="0", CUDACXX="false", TORCH_CUDA_ARCH_LIST="8.0 Ampere")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST holds 'Ampere'" in one_line(done.stderr)


@needs_compiler
def test_every_source_is_compiled_with_its_flags(tmp_path: Path) -> None:
    done = configured(tmp_path, EPT_BUILD_CPU="1", EPT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "modules.txt").read_text().split() == ["_C"]
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    flags = {Path(entry["file"]).stem: entry["command"].split() for entry in entries}
    x86 = "avx2" in flags
    expected = {path.stem for path in CSRC.glob("cpu/*.cpp") if x86 or not path.stem.startswith("avx")}
    assert set(flags) == {*expected, "binding", "test_cpu"}
    del flags["test_cpu"]
    machine = {name: [flag for flag in found if flag.startswith("-m")] for name, found in flags.items()}
    special = {"avx2", "avx512", "avx512bf16"} if x86 else set()
    assert {name for name, found in machine.items() if found} == special
    if x86:
        assert machine["avx2"] == ["-mavx2", "-mfma"]
        assert machine["avx512bf16"] == [*machine["avx512"], "-mavx512bf16"]
        assert "-mavx512f" in machine["avx512"]
    for name, found in flags.items():
        assert {"-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"} <= set(found), name
        assert not any("torch" in flag for flag in found), "the module serves every PyTorch"


# --- setup.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of the build around a module that compiles in a second."""
    tree = tmp_path / "tree"
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "ept/version.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tree / name)
    for name in ("ept/__init__.py", "ept_kernels/__init__.py", "tests/cpp/test_cpu.cpp", "csrc/cpu/plan.cpp"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    for name in ("avx2", "avx512", "avx512bf16"):
        (tree / f"csrc/cpu/{name}.cpp").touch()
    (tree / "csrc/binding.cpp").write_text(
        """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "a module", -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&definition); }
"""
    )
    return tree


def setup(tree: Path, *arguments: str, before: str = "", **chosen: str) -> subprocess.CompletedProcess[str]:
    """Runs ``setup.py`` with the Python code ``before`` in front of it."""
    script = f"import runpy, sys\nsys.argv = ['setup.py', *sys.argv[1:]]\n{before}\nrunpy.run_path('setup.py')"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tree, env=environment(**chosen))


@pytest.mark.parametrize("part", ["CPU", "CUDA"])
def test_another_wish_is_refused(part: str, tree: Path) -> None:
    done = setup(tree, "--version", **{f"EPT_BUILD_{part}": "yes"})
    assert done.returncode != 0
    assert f"EPT_BUILD_{part} must be 0, 1 or unset, got 'yes'" in done.stderr


def test_without_cmake_the_package_is_pure_python(tree: Path) -> None:
    no_cmake = "import shutil\nshutil.which = lambda *arguments, **options: None"
    done = setup(tree, "bdist_wheel", before=no_cmake)
    assert done.returncode == 0, done.stderr
    assert "the native kernels are left out: cmake was not found" in done.stderr
    assert [path.name.endswith("-none-any.whl") for path in tree.glob("dist/*.whl")] == [True]
    done = setup(tree, "build_ext", before=no_cmake, EPT_BUILD_CPU="1")
    assert done.returncode != 0
    assert "ept_kernels._C cannot be built: cmake was not found" in done.stderr


@needs_cmake
def test_without_a_compiler_the_wheel_fits_every_platform(tree: Path) -> None:
    done = setup(tree, "bdist_wheel", CXX="false", EPT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "the CPU kernels are left out: the C++ compiler does not work" in done.stderr
    assert [path.name.endswith("-none-any.whl") for path in tree.glob("dist/*.whl")] == [True]
    done = setup(tree, "bdist_wheel", CXX="false", EPT_BUILD_CPU="1", EPT_BUILD_CUDA="0")
    assert done.returncode != 0
    assert done.stderr.endswith("EPT_BUILD_CPU=1, but: the C++ compiler does not work: CXX=false\n")


@needs_cmake
def test_what_is_no_architecture_ends_the_build(tree: Path) -> None:
    """Though nobody demands the CUDA kernels: they would be missing by mistake."""
    done = setup(tree, "build_ext", EPT_BUILD_CPU="0", CUDACXX="false", TORCH_CUDA_ARCH_LIST="Ampere")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST holds 'Ampere'" in done.stderr.splitlines()[-1]


@needs_compiler
def test_a_build_that_fails_is_left_out_unless_it_is_demanded(tree: Path) -> None:
    """And what an earlier build left is not taken for it; another compiler is noticed."""
    build = ("build_ext", "--inplace")
    done = setup(tree, *build, EPT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (module,) = tree.glob("ept_kernels/_C*")
    script = "import sys; sys.path.insert(0, 'ept_kernels'); import _C; print(_C.__doc__)"
    told = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True)
    assert told.stdout == "a module\n", told.stderr
    module.unlink()

    (tree / "csrc/cpu/plan.cpp").write_text("#error planted\n")
    done = setup(tree, *build, EPT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "ept_kernels._C is left out: building it failed" in done.stderr
    assert not module.exists()
    done = setup(tree, *build, EPT_BUILD_CPU="1", EPT_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "building ept_kernels._C failed" in done.stderr
    assert "CXX=false" in setup(tree, *build, CXX="false", EPT_BUILD_CUDA="0").stderr


@pytest.mark.skipif(_tool("cmake") is None or shutil.which("nvcc") is None, reason="cmake or nvcc is not installed")
def test_nvcc_alone_builds_the_library_under_the_name_that_its_backend_loads(tree: Path) -> None:
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/library.cu").write_text(
        "__global__ void kernel() {}\nint launch() { kernel<<<1, 1>>>(); return 0; }\n"
    )
    hide_torch = "sys.modules['torch'] = None"  # pip's isolated build has none
    done = setup(
        tree,
        "build_ext",
        "--inplace",
        before=hide_torch,
        EPT_BUILD_CPU="0",
        EPT_BUILD_CUDA="1",
        TORCH_CUDA_ARCH_LIST="8.0",
    )
    assert done.returncode == 0, done.stderr
    assert (tree / "ept_kernels/_cuda.so").exists()
