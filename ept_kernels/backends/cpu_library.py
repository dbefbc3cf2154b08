"""The compiled module ``ept_kernels._C``: whether there is one, which instruction set it uses."""

from __future__ import annotations

import ctypes
import importlib
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

_DTYPES = (torch.float32, torch.bfloat16)


def _thread_pool() -> tuple[int, int]:
    """Addresses of the C functions that run a loop on PyTorch's intra-op threads and count those."""
    folder = Path(torch.__file__).parent / "lib"
    libraries = {"nt": "torch_cpu.dll"}.get(os.name, "libtorch_cpu.so")
    path = folder / libraries
    library = ctypes.CDLL(str(path if path.exists() else folder / "libtorch_cpu.dylib"))
    functions = (library.torch_parallel_for, library.torch_get_num_threads)
    loop, count = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return loop, count


@lru_cache(maxsize=1)
def _extension() -> ModuleType | str:
    """The compiled module, ready for use, or why there is none."""
    try:
        module = importlib.import_module("ept_kernels._C")
    except ImportError as error:
        return f"the compiled module is missing or does not load (see csrc/README.md): {error}"
    try:
        module.set_thread_pool(*_thread_pool())
        module.select_cpu_isa(os.environ.get("EPT_CPU_ISA", ""))
    except (AttributeError, OSError) as error:
        return f"torch {torch.__version__} has no C entry to its threads, which torch >= 2.10 has: {error}"
    except ValueError as error:
        return f"EPT_CPU_ISA: {error}"
    return module


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``dtype`` on ``device``, or None."""
    if device.type != "cpu":
        return f"it serves the CPU, not {device.type}"
    if dtype not in _DTYPES:
        return f"it computes in float32 and bfloat16, not {dtype}"
    extension = _extension()
    return extension if isinstance(extension, str) else None


@lru_cache(maxsize=1)
def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: there is none; the message says why.
    """
    extension = _extension()
    if isinstance(extension, str):
        raise RuntimeError(extension)
    return extension


def build_info() -> dict[str, str | list[str]]:
    """What the compiled module is: ``compiler``, and the instruction sets ``cpu_compiled``, ``cpu_detected`` on this
    processor (best first) and ``cpu_selected``.

    Raises:
        RuntimeError: there is no compiled module; the message says why.
    """
    return module().build_info()


def select_instruction_set(isa: str) -> None:
    """Use one of ``build_info()["cpu_detected"]`` from now on, or the best for ``""``.

    The environment variable ``EPT_CPU_ISA`` names the first one.

    Raises:
        ValueError: an instruction set that is not built or not on this processor.
        RuntimeError: there is no compiled module; the message says why.
    """
    module().select_cpu_isa(isa)
