"""What ``setup.py`` builds, leaves out, and refuses; the built module itself is tested in ``tests/kernels``."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable in ("EPT_BUILD_CPU", "EPT_BUILD_CUDA", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("build_native", CSRC / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "cuda_sources", list)
    return module


def with_cuda_sources(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BUILD_CPU", "0")
    monkeypatch.setattr(build, "cuda_sources", lambda: [CSRC / "cuda" / "core.cu"])


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"], ids=["absent", "useless"])
def test_without_a_compiler_the_cpu_kernels_are_left_out(
    compiler: str, build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert build.extensions() == []
    assert f"the CPU kernels are left out: {compiler}" in capsys.readouterr().err
    monkeypatch.setenv("EPT_BUILD_CPU", "1")
    with pytest.raises(SystemExit, match=f"EPT_BUILD_CPU=1, but: {compiler}"):
        build.extensions()


def test_no_compiler_on_the_path(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.Unavailable, match=r"no C\+\+ compiler found"):
        build.probe_cpu()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on the path")
def test_with_a_compiler_they_are_built_unless_refused(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (extension,) = build.extensions()
    assert extension.name == "ept_kernels._C"
    assert extension.optional, "a build that fails later must not fail the installation"
    monkeypatch.setenv("EPT_BUILD_CPU", "1")
    assert not build.extensions()[0].optional
    monkeypatch.setenv("EPT_BUILD_CPU", "0")
    assert build.extensions() == []
    assert "the CPU kernels are left out: EPT_BUILD_CPU=0" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["CPU", "CUDA"])
def test_another_wish_is_refused(part: str, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda_sources(build, monkeypatch)
    monkeypatch.setenv(f"EPT_BUILD_{part}", "yes")
    with pytest.raises(SystemExit, match=f"EPT_BUILD_{part} must be 0, 1 or unset, got 'yes'"):
        build.extensions()


def test_without_nvcc_the_cuda_kernels_are_left_out(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with_cuda_sources(build, monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.extensions() == []
    assert "the CUDA kernels are left out: nvcc was not found" in capsys.readouterr().err
    monkeypatch.setenv("EPT_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="EPT_BUILD_CUDA=1, but: nvcc was not found"):
        build.extensions()


def test_cuda_architectures(build: ModuleType) -> None:
    sm_80 = "-gencode=arch=compute_80,code=sm_80"
    sm_90 = ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"]
    assert build.gencode(build.DEFAULT_CUDA_ARCHITECTURES) == [sm_80, *sm_90]
    assert build.gencode("8.0;9.0+PTX") == build.gencode("8.0 9.0 +PTX") == [sm_80, *sm_90]
    assert build.gencode("12.0") == ["-gencode=arch=compute_120,code=sm_120"]
    assert build.gencode("9.0a") == ["-gencode=arch=compute_90a,code=sm_90a"]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST holds 'Ampere'"):
        build.gencode("Ampere")


def test_commands_hold_every_source_and_its_flags(build: ModuleType) -> None:
    commands, (target, link) = build.cpu_commands(Path("objects"), Path("_C.so"))
    sources = {source.name for source, _ in commands.values()}
    assert {"binding.cpp", "pyramid.cpp", "portable.cpp"} <= sources
    by_name = {source.stem: command for source, command in commands.values()}
    assert not any(flag.startswith("-m") and flag not in ("-MMD", "-MF") for flag in by_name["portable"])
    if "avx512" in by_name:
        assert "-mavx512f" in by_name["avx512"]
    assert not any("march=native" in flag for command in by_name.values() for flag in command)
    assert str(target) in link


def test_the_cuda_commands_know_no_torch(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's isolated build has none."""
    with_cuda_sources(build, monkeypatch)
    monkeypatch.setattr(build, "probe_cuda", lambda: "nvcc")
    commands, (_, link) = build.cuda_commands(Path("objects"), Path("_cuda.so"))
    for command in (*(command for _, command in commands.values()), link):
        assert not any("torch" in part.lower() for part in command)
    assert "static" in link


def test_the_cuda_library_has_the_name_that_its_backend_loads() -> None:
    """In a process of its own: which distutils a command is checked against depends on what was imported before."""
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from build_native import BuildNative
from setuptools import Distribution

command = BuildNative(Distribution())
print(*map(command.get_ext_filename, ("ept_kernels._cuda", "_cuda", "ept_kernels._C")))
"""
    done = subprocess.run([sys.executable, "-c", script, str(CSRC)], capture_output=True, text=True, check=True)
    library, bare, module = done.stdout.split()
    assert library == str(Path("ept_kernels", "_cuda.so"))
    assert bare == "_cuda.so"
    assert module != str(Path("ept_kernels", "_C.so"))
