"""Builds the native sources for ``setup.py``: what can be built here, why not otherwise, and the build itself.

``EPT_BUILD_CPU`` and ``EPT_BUILD_CUDA``: ``1`` fails loudly where the toolchain is missing, ``0`` never builds, unset
builds where it can. Neither part needs PyTorch, so that pip's isolated build makes both. The CPU sources need a C++20
compiler (GCC or Clang) and pybind11; they take addresses and find PyTorch's thread pool at run time. The CUDA sources
need nvcc alone: they are a plain C library that takes addresses and a stream.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent
CPU_MODULE, CUDA_LIBRARY = "ept_kernels._C", "ept_kernels._cuda"

#: Instruction sets of x86 and what the compiler must be told; ``portable.cpp`` needs nothing.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
X86_FLAGS = {
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
}
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
DEFAULT_CUDA_ARCHITECTURES = "8.0 9.0+PTX"


class Unavailable(Exception):
    """Why something cannot be built here."""


def compiler() -> list[str]:
    """The C++ compiler's command: ``CXX``, else the first of g++, clang++, c++ on the path."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        raise Unavailable("no C++ compiler found (g++, clang++ or c++; CXX names another)")
    return [found]


def probe_cpu() -> list[str]:
    """The compiler's command, or ``Unavailable``."""
    if os.name == "nt":
        raise Unavailable("the CPU kernels use vector extensions of GCC and Clang")
    cxx = compiler()
    if importlib.util.find_spec("pybind11") is None:
        raise Unavailable("pybind11 is not installed")
    import pybind11

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <concepts>\n#include <Python.h>\n#include <pybind11/pybind11.h>\n")
        include = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        command = [*cxx, "-std=c++20", "-fsyntax-only", *include, str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise Unavailable(f"{cxx[0]} does not run: {error}") from error
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise Unavailable(f"{cxx[0]} cannot compile C++20 with Python's headers: {first}")
    return cxx


def probe_cuda() -> str:
    """The path of nvcc, or ``Unavailable``."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = str(Path(home) / "bin" / "nvcc") if home else None
    nvcc = shutil.which(beside) if beside else None
    nvcc = nvcc or shutil.which("nvcc")
    if not nvcc:
        raise Unavailable("nvcc was not found on the path or in CUDA_HOME")
    return nvcc


def cuda_sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def extensions() -> list[Extension]:
    """What to build, by the environment and the toolchain; says what is left out and why."""
    found = []
    parts = [("CPU", CPU_MODULE, probe_cpu)]
    if cuda_sources():
        parts.append(("CUDA", CUDA_LIBRARY, probe_cuda))
    for part, module, probe in parts:
        wish = os.environ.get(f"EPT_BUILD_{part}", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"EPT_BUILD_{part} must be 0, 1 or unset, got {wish!r}")
        try:
            if wish == "0":
                raise Unavailable(f"EPT_BUILD_{part}=0")
            probe()
        except Unavailable as reason:
            if wish == "1":
                raise SystemExit(f"EPT_BUILD_{part}=1, but: {reason}") from reason
            say(f"the {part} kernels are left out: {reason}")
            continue
        # Optional: a build that fails later, too, only leaves them out, unless they were demanded.
        found.append(Extension(module, sources=[], optional=wish != "1"))
    return found


def say(message: str) -> None:
    print(f"ept-kernels: {message}", file=sys.stderr, flush=True)


class BuildNative(build_ext):
    """Compiles in parallel with flags of its own for each file, through ninja where there is one."""

    def get_ext_filename(self, fullname: str) -> str:
        parts = fullname.split(".")  # an in-place build asks for the last part alone
        if parts[-1] == CUDA_LIBRARY.split(".")[-1]:  # a plain library for ctypes and any Python
            return str(Path(*parts)) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp).absolute() / extension.name
        objects.mkdir(parents=True, exist_ok=True)
        build = cpu_commands if extension.name == CPU_MODULE else cuda_commands
        compile_commands, link = build(objects, target)
        try:
            run_all(objects, compile_commands, link)
        except subprocess.CalledProcessError as error:
            if not extension.optional:
                raise SystemExit(f"building {extension.name} failed: {shlex.join(error.cmd)}") from error
            say(f"{extension.name} is left out: {shlex.join(error.cmd)} failed")
            target.unlink(missing_ok=True)


#: Object file -> (source, command that makes it).
Commands = dict[Path, tuple[Path, list[str]]]
Link = tuple[Path, list[str]]


def cpu_commands(objects: Path, target: Path) -> tuple[Commands, Link]:
    """How to compile and link ``ept_kernels._C``."""
    import pybind11

    cxx = probe_cpu()
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [*CXX_FLAGS, f"-I{CSRC}", *(["-DEPT_X86"] if is_x86 else [])]
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    commands: Commands = {}
    for source in [*sorted((CSRC / "cpu").glob("*.cpp")), CSRC / "binding.cpp"]:
        if source.stem in X86_FLAGS and not is_x86:
            continue
        special = X86_FLAGS.get(source.stem, python if source.stem == "binding" else [])
        made = objects / f"{source.stem}.o"
        commands[made] = (
            source,
            [*cxx, *flags, *special, "-MMD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)],
        )
    dynamic = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return commands, (target, [*cxx, "-shared", *dynamic, *map(str, commands), "-o", str(target)])


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list as in ``TORCH_CUDA_ARCH_LIST``: ``8.0 9.0+PTX`` or ``8.0;9.0``."""
    flags = []
    for entry in architectures.replace(";", " ").replace(" +PTX", "+PTX").split():
        number, _, ptx = entry.partition("+")
        digits = number.replace(".", "")
        if not digits[:-1].isdigit() or ptx not in ("", "PTX"):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; allowed: numbers such as 8.0, with or without +PTX"
            )
        flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    return flags


def cuda_commands(objects: Path, target: Path) -> tuple[Commands, Link]:
    """How to compile and link ``ept_kernels/_cuda.so``: every ``cuda/*.cu``, and the CUDA runtime inside."""
    nvcc = probe_cuda()
    architectures = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES)
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *architectures]
    commands: Commands = {}
    for source in cuda_sources():
        made = objects / f"{source.stem}.o"
        commands[made] = (source, [nvcc, *flags, "-MMD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)])
    link = [nvcc, "-shared", "-cudart", "static", *architectures, *map(str, commands), "-o", str(target)]
    return commands, (target, link)


def run_all(objects: Path, commands: Commands, link: Link) -> None:
    """Compile, then link. ninja compiles only what changed; without it everything is compiled, in parallel."""
    target, link_command = link
    beside_python = str(Path(sys.executable).parent)  # where pip puts ninja; pip's builds do not have it on the path
    ninja = shutil.which("ninja", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if ninja:
        rules = [
            "rule cc",
            "  command = $command",
            "  description = $what",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $command",
            "  description = $what",
        ]
        for made, (source, command) in commands.items():
            rules += [f"build {escaped(made)}: cc {escaped(source)}", f"  command = {dollars(shlex.join(command))}"]
            rules += [f"  what = {source.name}"]
        rules += [f"build {escaped(target)}: link {' '.join(map(escaped, commands))}"]
        rules += [f"  command = {dollars(shlex.join(link_command))}", f"  what = {target.name}", ""]
        (objects / "build.ninja").write_text("\n".join(rules))
        subprocess.run([ninja, "-C", str(objects)], check=True)
        return
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: subprocess.run(job[1], check=True), commands.values()))
    subprocess.run(link_command, check=True)


def dollars(text: str) -> str:
    return text.replace("$", "$$")


def escaped(path: Path) -> str:
    return dollars(str(path)).replace(" ", "$ ").replace(":", "$:")
