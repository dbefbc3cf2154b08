"""The CUDA library ``_cuda.so`` as Python sees it: its structs, how it is opened, how its functions are called.

It is plain C: addresses and a stream go in, an error code comes out. nvcc alone builds it, and it serves every Python
and every torch. ``setup.py`` or CMake makes it; importing this module needs neither it nor a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from ctypes import Structure, c_float, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
#: How the library counts the types of its numbers.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: The oldest compute capability that the kernels are written for.
CAPABILITY = (7, 5)

#: ``kInterface`` and ``kInlineScales`` of ``csrc/cuda/params.h``, whose structs follow, field by field.
INTERFACE = 1
INLINE_SCALES = 32


class Pyramid(Structure):
    _fields_ = [
        ("table", c_void_p),
        ("columns", c_int64),
        ("folded", c_int64),
        ("rank", c_int32),
        ("count", c_int32),
        ("k", c_int32 * INLINE_SCALES),
    ]


class InterleaveParams(Structure):
    _fields_ = [
        ("pyramid", Pyramid),
        ("A", c_void_p),
        ("a_rank", c_int64),
        ("a_index", c_int64),
        ("B", c_void_p),
        ("b_rank", c_int64),
        ("b_index", c_int64),
        ("A_hat", c_void_p),
        ("B_hat", c_void_p),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("factor_dtype", c_int32),
        ("dtype", c_int32),
    ]


class GatherParams(Structure):
    _fields_ = [
        ("pyramid", Pyramid),
        ("A_hat", c_void_p),
        ("B_hat", c_void_p),
        ("A", c_void_p),
        ("B", c_void_p),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("width", c_int32),
        ("height", c_int32),
        ("a_dtype", c_int32),
        ("b_dtype", c_int32),
    ]


class CoreParams(Structure):
    _fields_ = [
        ("pyramid", Pyramid),
        ("ids", c_void_p),
        ("rows_per_id", c_int64),
        ("groups", c_int64),
        ("folded", c_void_p),
        ("active", c_void_p),
        ("rows", c_int64),
        ("U", c_void_p),
        ("V", c_void_p),
        ("dV", c_void_p),
        ("dU", c_void_p),
        ("grad_folded", c_void_p),
        ("partial", c_void_p),
        ("spans", c_int64),
        ("rows_per_span", c_int64),
        ("wide_ids", c_int32),
        ("dtype", c_int32),
    ]


class DropoutParams(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("out", c_void_p),
        ("seed", c_void_p),
        ("rows", c_int64),
        ("x_stride", c_int64),
        ("out_stride", c_int64),
        ("columns", c_int32),
        ("threshold", c_uint32),
        ("factor", c_float),
        ("accumulate", c_int32),
        ("dtype", c_int32),
    ]


#: ``kMostExperts``: of a fold.
MOST_EXPERTS = 64


class Experts(Structure):
    _fields_ = [
        ("offset", c_int64 * MOST_EXPERTS),
        ("k", c_int32 * MOST_EXPERTS),
        ("scale", c_int32 * MOST_EXPERTS),
        ("factor", c_float * MOST_EXPERTS),
        ("count", c_int32),
    ]


#: What a fold and its gradient read, in the order of both structs.
_ROUTED: list[tuple[str, Any]] = [
    ("experts", Experts),
    ("kernels", c_void_p * MOST_EXPERTS),
    ("gate", c_void_p),
    ("table", c_void_p),
    ("tasks", c_void_p),
    ("first_task", c_int64),
    ("num_tasks", c_int64),
    ("groups", c_int64),
    ("folded_size", c_int64),
]


class FoldParams(Structure):
    _fields_ = [
        *_ROUTED,
        ("folded", c_void_p),
        ("active", c_void_p),
        ("gates", c_void_p),
        ("probability", c_void_p),
        ("width", c_int32),
        ("scales", c_int32),
        ("top_k", c_int32),
    ]


class FoldGradParams(Structure):
    _fields_ = [
        *_ROUTED,
        ("grad", c_void_p),
        ("gates", c_void_p),
        ("probability", c_void_p),
        ("logits_grad", c_void_p),
        ("grad_kernels", c_void_p),
        ("grad_gate", c_void_p),
        ("grad_table", c_void_p),
        ("numbers", c_int64),
        ("width", c_int32),
    ]


#: Functions of the library that take a struct and a stream, in the order of ``ept_sizes``.
FUNCTIONS: dict[str, type[Structure]] = {
    "ept_interleave": InterleaveParams,
    "ept_gather": GatherParams,
    "ept_core": CoreParams,
    "ept_dropout": DropoutParams,
    "ept_fold": FoldParams,
    "ept_fold_grad": FoldGradParams,
}

_CODES = {c_void_p: "P", c_int64: "q", c_int32: "i", c_uint32: "I", c_float: "f"}


def _packer(params: type[Structure]) -> Callable[..., bytes]:
    """Makes the bytes of a struct from its fields in order, inner structs and arrays as bytes of their own.

    Several times as fast as to fill a ``Structure``, and an eager layer waits for it.
    """
    kinds: list[Any] = [field[1] for field in params._fields_]
    codes = [_CODES.get(kind) or f"{ctypes.sizeof(kind)}s" for kind in kinds]
    return struct.Struct(f"@{''.join(codes)}0q").pack


PACKERS = {function: _packer(params) for function, params in FUNCTIONS.items()}


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    """The library; ``RuntimeError`` says why it cannot be used."""
    if not path.exists():
        raise RuntimeError(f"{path.name} has not been built; build it with EPT_BUILD_CUDA=1 pip install .")
    try:
        library = ctypes.CDLL(str(path))
        expected = [INTERFACE, *map(ctypes.sizeof, FUNCTIONS.values())]
        found = list((c_int32 * len(expected)).in_dll(library, "ept_sizes"))
        if found != expected:
            raise RuntimeError(
                f"{path.name} is of another version of this package, with the interface {found} instead of {expected};"
                " build it again with EPT_BUILD_CUDA=1 pip install ."
            )
        for function in FUNCTIONS:
            getattr(library, function).argtypes = (c_void_p, c_void_p)
        for text in ("ept_error_name", "ept_error_text", "ept_build_info"):
            getattr(library, text).restype = ctypes.c_char_p
    except (OSError, AttributeError, ValueError) as error:
        raise RuntimeError(f"{path.name} does not load: {error}") from error
    return library


def _error(library: ctypes.CDLL, code: int) -> str:
    return f"{library.ept_error_name(code).decode()} ({library.ept_error_text(code).decode()})"


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``dtype`` on ``device``, or None."""
    if device.type != "cuda":
        return f"its kernels run on CUDA devices, not on {device.type}"
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(map(str, DTYPES))}"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA GPU is available"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "its kernels need a GPU of compute capability 7.5 or newer"
    try:
        library = _open(LIBRARY)
    except RuntimeError as error:
        return str(error)
    with torch.cuda.device(device):
        code = library.ept_probe()
    if code:
        return f"{LIBRARY.name} does not run on {torch.cuda.get_device_name(device)}: {_error(library, code)}"
    return None


def build_info(library: Path = LIBRARY) -> dict[str, str | list[str]]:
    """What the library is: ``architectures`` that it was compiled for, such as "8.0", and ``compiler``.

    Raises:
        RuntimeError: there is no library, or it does not load; the message says why.
    """
    compiled, compiler = _open(library).ept_build_info().decode().split(";")
    return {
        "architectures": [f"{int(a) // 100}.{int(a) % 100 // 10}" for a in compiled.split(",") if a],
        "compiler": compiler,
    }


#: Functions of a torch that is built for CUDA.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@functools.cache
def _serving() -> ctypes.CDLL:
    return _open(LIBRARY)


def launch(function: str, tensor: Tensor, *fields: object) -> None:
    """Call a function with the fields of its struct, on the device of ``tensor`` and its current stream."""
    call, params, device = getattr(_serving(), function), PACKERS[function](*fields), tensor.get_device()
    if device == _current_device():
        code = call(params, _current_stream(device))
    else:
        with torch.cuda.device(device):
            code = call(params, _current_stream(device))
    if code:
        raise RuntimeError(f"{function} failed on {tensor.device}: {_error(_serving(), code)}")


def address(tensor: Tensor | None) -> int:
    """What a struct holds for a tensor; null for none."""
    return 0 if tensor is None else tensor.data_ptr()
