"""Compiles ``csrc/cuda`` with g++ against the stand-in for the CUDA runtime: once a session and flavour."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"

#: Added to every compilation of a flavour. The runtime itself is compiled with the define alone (see runtime.cpp).
FLAGS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
DEFINES = {"plain": [], "address": ["-DSHIM_ADDRESS_SANITIZER"], "thread": ["-DSHIM_THREAD_SANITIZER"]}


def missing() -> str | None:
    """Why the kernels cannot be executed here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"the context switch is not written for {platform.machine()}"
    return None


def sources() -> list[Path]:
    """Every source of the library."""
    return sorted(SOURCES.glob("*.cu"))


def run(command: Sequence[str | Path]) -> None:
    """Run a compiler; on failure show what it said."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"


@dataclass(frozen=True)
class Build:
    """The objects of one flavour, in ``folder``."""

    flavour: str
    folder: Path

    @property
    def objects(self) -> dict[str, Path]:
        """By name of their source: the library, the runtime and the driver's main."""
        return {source.name: self.folder / f"{source.stem}.o" for source in self._sources()}

    @staticmethod
    def _sources() -> list[Path]:
        return [*sources(), HERE / "runtime.cpp", HERE / "driver.cpp"]

    def compile(self, source: Path, target: Path, *extra: str | Path) -> Path:
        """One object from one source; headers come from beside the source first, then from csrc/cuda."""
        flags = FLAGS[self.flavour] if source.name != "runtime.cpp" else ["-O2", "-fno-tree-loop-distribute-patterns"]
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        includes = ["-I", HERE / "include", "-I", SOURCES]
        language = ["-x", "c++", "-std=c++20", "-march=native", "-fPIC", *DEFINES[self.flavour]]
        run(["g++", *language, *flags, *warnings, *includes, *extra, "-c", source, "-o", target])
        return target

    def compile_all(self) -> Build:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: self.compile(source, self.objects[source.name]), self._sources()))
        return self

    def driver(self, target: Path, replaced: dict[str, Path] | None = None) -> Path:
        """Link the stand-alone driver, some objects replaced by name of their source."""
        run(["g++", *FLAGS[self.flavour], *{**self.objects, **(replaced or {})}.values(), "-o", target, "-lpthread"])
        return target

    def library(self, target: Path) -> Path:
        """Link what ``cuda_backend`` loads; its functions take addresses of this process."""
        objects = [path for name, path in self.objects.items() if name != "driver.cpp"]
        run(["g++", "-shared", *FLAGS[self.flavour], *objects, "-o", target, "-lpthread"])
        return target
