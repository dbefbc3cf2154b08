"""Builds the native kernels of ``csrc/`` by CMake where a toolchain is found; without one the package is pure Python.

``CMakeLists.txt`` knows what can be built, how, and why not otherwise. ``EPT_BUILD_CPU`` and ``EPT_BUILD_CUDA``: ``1``
fails loudly where that part cannot be built, ``0`` never builds it, unset builds it where the toolchain is found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PARTS = {"CPU": "ept_kernels._C", "CUDA": "ept_kernels._cuda"}
#: What CMake remembers from the first time that it looks at a folder.
REMEMBERED = ("CC", "CXX", "CXXFLAGS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")


def say(message: str) -> None:
    print(f"ept-kernels: {message}", file=sys.stderr, flush=True)


def tool(name: str) -> str | None:
    """A program on the path or beside this Python, where pip puts it."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name) or shutil.which(name, path=beside)


def extensions() -> list[Extension]:
    """What the environment does not rule out; CMake finds out what is possible."""
    found = []
    for part, module in PARTS.items():
        wish = os.environ.get(f"EPT_BUILD_{part}", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"EPT_BUILD_{part} must be 0, 1 or unset, got {wish!r}")
        if wish == "0":
            say(f"the {part} kernels are left out: EPT_BUILD_{part}=0")
        else:
            # Optional: what cannot be built is left out.
            found.append(Extension(module, sources=[], optional=wish != "1"))
    if found and tool("cmake") is None:
        demanded = [extension.name for extension in found if not extension.optional]
        if demanded:
            raise SystemExit(f"{' and '.join(demanded)} cannot be built: cmake was not found (pip install cmake)")
        say("the native kernels are left out: cmake was not found (pip install cmake)")
        return []
    return found


class BuildNative(build_ext):
    """Configures once, then builds a target of CMake for each extension."""

    def run(self) -> None:
        if self.extensions:
            possible = self.configure()
            self.extensions = [extension for extension in self.extensions if extension.name in possible]
            self.distribution.ext_modules = self.extensions
        super().run()

    @property
    def folder(self) -> Path:
        return Path(self.build_temp).absolute() / "cmake"

    def configure(self) -> list[str]:
        """The names of the extensions that can be built here. CMake prints the reasons for the others."""
        ninja = tool("ninja")
        settings = "\n".join(
            [str(ROOT), sys.executable, str(bool(ninja)), *(f"{name}={os.environ.get(name)}" for name in REMEMBERED)]
        )
        stamp = self.folder / "settings"
        if not stamp.exists() or stamp.read_text() != settings:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            stamp.write_text(settings)
        command = ["-S", ROOT, "-B", self.folder, f"-DPython_EXECUTABLE={sys.executable}"]
        if ninja:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        refused = self.folder / "refused.txt"
        refused.unlink(missing_ok=True)
        if not self.cmake(*command):
            if refused.exists():
                raise SystemExit(refused.read_text().strip())
            if not all(extension.optional for extension in self.extensions):
                raise SystemExit("the native kernels cannot be built: what CMake says is above")
            say("the native kernels are left out: what CMake says is above")
            return []
        return [f"ept_kernels.{target}" for target in (self.folder / "modules.txt").read_text().split()]

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        if not self.cmake("--build", self.folder, "--target", extension.name.rpartition(".")[2]):
            if not extension.optional:
                raise SystemExit(f"building {extension.name} failed: what the compiler says is above")
            say(f"{extension.name} is left out: building it failed")
            target.unlink(missing_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / target.name, target)

    def cmake(self, *arguments: object) -> bool:
        """Whether it succeeds."""
        jobs = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
        return subprocess.run([tool("cmake"), *map(str, arguments)], env={**jobs, **os.environ}).returncode == 0

    def get_ext_filename(self, fullname: str) -> str:
        parts = fullname.split(".")  # an in-place build asks for the last part alone
        if parts[-1] == "_cuda":  # a plain library for ctypes and any Python
            return str(Path(*parts)) + ".so"
        return super().get_ext_filename(fullname)


class Wheel(bdist_wheel):
    """Fits every platform if nothing native could be built, which only the build finds out."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
