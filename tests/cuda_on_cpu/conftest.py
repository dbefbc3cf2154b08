"""Builds shared by the tests that execute the CUDA kernels on a CPU; once a session, whatever the number of workers."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_on_cpu.build import Build, missing

from ept_kernels.backends import cuda_library


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Callable[[str, Callable[[], object]], None]:
    """Calls a function in the first worker that comes; the others wait for it."""

    def call(name: str, make: Callable[[], object]) -> None:
        with (shared_folder / f"{name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not lock.read():
                make()
                lock.write("done")

    return call


@pytest.fixture(scope="session")
def build(shared_folder: Path, once: Callable[[str, Callable[[], object]], None]) -> Callable[[str], Build]:
    """The kernels, compiled in a flavour."""
    if (reason := missing()) is not None:
        pytest.skip(f"the CUDA kernels cannot be executed on this CPU: {reason}")

    def get(flavour: str) -> Build:
        folder = shared_folder / flavour
        once(flavour, lambda: Build(flavour, folder).compile_all().driver(folder / "driver"))
        return Build(flavour, folder)

    return get


@pytest.fixture(scope="session")
def library(
    build: Callable[[str], Build], shared_folder: Path, once: Callable[[str, Callable[[], object]], None]
) -> Path:
    """The library with its functions running on this CPU."""
    plain, target = build("plain"), shared_folder / "_cuda.so"
    once("library", lambda: plain.library(target))
    return target


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU tensor is where it belongs: there is neither a device nor a stream to choose."""
    monkeypatch.setattr(cuda_library, "_current_device", lambda: -1)
    monkeypatch.setattr(cuda_library, "_current_stream", lambda device: None)


@pytest.fixture
def cuda(library: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of ``cuda_backend`` serve CPU tensors, in this process."""
    monkeypatch.setattr(cuda_library, "_serving", lambda: cuda_library._open(library))
