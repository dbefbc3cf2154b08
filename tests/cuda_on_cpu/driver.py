"""Stands for the library in Python, and runs its calls one by one in the stand-alone driver, where sanitizers work."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ept_kernels.backends import cuda as cuda_backend
from ept_kernels.backends import cuda_library


class Memory(TorchDispatchMode):
    """Keeps, and finds by address, the memory of every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self._storages[storage.data_ptr()] = storage
        return result

    def find(self, address: int) -> torch.UntypedStorage:
        for start, storage in self._storages.items():
            if start <= address < start + storage.nbytes():
                return storage
        raise AssertionError(f"{address:#x} is the address of no tensor that is alive")


def _addresses(value: Any, kind: Any, place: int = 0) -> Iterator[tuple[int, int]]:
    """``(place, address)`` of every pointer of a struct that is not null."""
    if kind is ctypes.c_void_p:
        if value:
            yield place, value
    elif issubclass(kind, ctypes.Structure):
        for name, inner in kind._fields_:
            yield from _addresses(getattr(value, name), inner, place + getattr(kind, name).offset)
    elif issubclass(kind, ctypes.Array):
        for i, item in enumerate(value):
            yield from _addresses(item, kind._type_, place + i * ctypes.sizeof(kind._type_))


class Failure(Exception):
    """The driver crashed; what it said."""


class DriverLibrary:
    """Has the functions of the library, for ``cuda_library._serving`` to return."""

    def __init__(self, driver: Path, memory: Memory, folder: Path, *, reverse: bool = False) -> None:
        self._driver, self._memory, self._folder = driver, memory, folder
        self._environment = {
            **os.environ,
            "EPT_SHIM_REVERSED": str(int(reverse)),
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "halt_on_error=1",
        }

    def __getattr__(self, function: str) -> Callable[..., int]:
        return lambda params, stream: self._run(function, cuda_library.FUNCTIONS[function].from_buffer_copy(params))

    def _run(self, function: str, params: ctypes.Structure) -> int:
        storages: list[torch.UntypedStorage] = []
        places = []
        for place, address in _addresses(params, type(params)):
            storage = self._memory.find(address)
            if storage not in storages:
                storages.append(storage)
            places.append(struct.pack("=3q", place, storages.index(storage), address - storage.data_ptr()))
        words = bytes(params).ljust(-(-ctypes.sizeof(params) // 8) * 8, b"\0")
        arrays = [torch.tensor([], dtype=torch.uint8).set_(storage) for storage in storages]
        message = struct.pack("=32sq", function.encode(), len(words)) + words + struct.pack("=q", len(arrays))
        for array in arrays:
            message += struct.pack("=q", len(array)) + array.numpy().tobytes()
        source, target = self._folder / "input", self._folder / "output"
        source.write_bytes(message + struct.pack("=q", len(places)) + b"".join(places))
        command = [str(self._driver), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment)
        if done.returncode != 0:
            raise Failure(f"exit status {done.returncode}: {done.stderr[:3000]}")
        answer = target.read_bytes()
        start = 8
        for array in arrays:
            array.numpy()[:] = memoryview(answer)[start : start + len(array)]
            start += len(array)
        return struct.unpack_from("=q", answer)[0]


def run_in(driver: Path, check: Callable[[], None], folder: Path, *, reverse: bool = False) -> str | None:
    """What is wrong when ``check`` has its kernels run by ``driver``, or None: a crash, a report, a wrong number."""
    cuda_backend._cached_pyramid.cache_clear()  # whose tables are of memory from before
    with pytest.MonkeyPatch.context() as patch, Memory() as memory:
        library = DriverLibrary(driver, memory, folder, reverse=reverse)
        patch.setattr(cuda_library, "_serving", lambda: library)
        try:
            check()
        except Failure as error:
            return f"crash: {error}"
        except AssertionError as error:
            return f"wrong: {error}"
        finally:
            cuda_backend._cached_pyramid.cache_clear()
    return None
