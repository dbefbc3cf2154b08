"""Builds shared by the tests that execute the CUDA kernels on a CPU; once a session, whatever the number of workers."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.build import Build, missing
from cuda_on_cpu.calls import SAMPLE, THREADS
from cuda_on_cpu.harness import Suite

from ept_kernels import cuda_backend, dispatch


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
def sample(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(SAMPLE, tmp_path_factory.mktemp("sample"), "sample")


@pytest.fixture(scope="session")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Fewer calls: ThreadSanitizer takes its time."""
    return Suite(THREADS, tmp_path_factory.mktemp("threads"), "threads")


@pytest.fixture(scope="session")
def library(
    build: Callable[[str], Build], shared_folder: Path, once: Callable[[str, Callable[[], object]], None]
) -> Path:
    """``torch.ops.ept_cuda``, on CPU tensors; the library that holds them."""
    plain, target = build("plain"), shared_folder / "ept_cuda_on_cpu.so"
    once("library", lambda: plain.library(target))
    torch.ops.load_library(target)
    return target


@pytest.fixture(params=["simt", "tensor cores"])
def cuda(request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backend ``cuda`` serves CPU tensors, with each family of kernels in turn."""
    monkeypatch.setattr(cuda_backend, "unsupported", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "_chosen", {})  # what is chosen now must be forgotten afterwards
    monkeypatch.setenv("EPT_BACKEND", "cuda")
    monkeypatch.setenv("EPT_SHIM_CAPABILITY", "7" if request.param == "simt" else "8")
    return request.param
