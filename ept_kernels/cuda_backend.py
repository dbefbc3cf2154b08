"""CUDA C++ kernels for what torch's library has no single call for; ``library.py`` makes the ops of them.

Interleaved factors, the k x k core and its adjoint, the gradients' gather, dropout that replays. With
W = r * sum(k), columns of intermediates run scale after scale, in each rank after rank, in each slot after slot. Sums
are fp32 whatever the rows are.

The library ``_cuda.so`` is plain C: addresses and a stream go in, an error code comes out. nvcc alone builds it, and it
serves every Python and every torch. ``setup.py`` or CMake makes it; importing this module needs neither it nor a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable, Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .library import Library

name = "cuda"
fuses_dropout = True
keeps = True

LIBRARY = Path(__file__).with_name("_cuda.so")
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


#: ``kMostExperts``: of a fold (``cuda_fold.py``).
MOST_EXPERTS = 64


class Experts(Structure):
    _fields_ = [
        ("offset", c_int64 * MOST_EXPERTS),
        ("k", c_int32 * MOST_EXPERTS),
        ("scale", c_int32 * MOST_EXPERTS),
        ("factor", c_float * MOST_EXPERTS),
        ("count", c_int32),
    ]


class FoldParams(Structure):
    _fields_ = [
        ("experts", Experts),
        ("kernels", c_void_p * MOST_EXPERTS),
        ("gate", c_void_p),
        ("table", c_void_p),
        ("tasks", c_void_p),
        ("first_task", c_int64),
        ("num_tasks", c_int64),
        ("groups", c_int64),
        ("folded_size", c_int64),
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
        ("experts", Experts),
        ("kernels", c_void_p * MOST_EXPERTS),
        ("gate", c_void_p),
        ("table", c_void_p),
        ("tasks", c_void_p),
        ("first_task", c_int64),
        ("num_tasks", c_int64),
        ("groups", c_int64),
        ("folded_size", c_int64),
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


@functools.lru_cache(maxsize=1024)
def _cached_pyramid(
    rank: int, scales: tuple[int, ...], device: torch.device | None
) -> tuple[int, bytes, Tensor | None]:
    table = None if device is None else torch.tensor(scales, dtype=torch.int32, device=device)
    columns, inline = rank * sum(scales), scales if table is None else ()
    params = Pyramid(address(table), columns, sum(k * k for k in scales), rank, len(scales), inline)
    return columns, bytes(params), table


def _pyramid(rank: int, scales: Sequence[int], like: Tensor) -> tuple[int, bytes, Tensor | None]:
    """W, the struct, and the table that the struct points to if it does not hold the scales itself."""
    scales = tuple(scales)
    return _cached_pyramid(rank, scales, None if len(scales) <= INLINE_SCALES else like.device)


def address(tensor: Tensor | None) -> int:
    """What a struct holds for a tensor; null for none."""
    return 0 if tensor is None else tensor.data_ptr()


def interleave(
    A: Tensor, B: Tensor, in_features: int, out_features: int, scales: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``A_hat [W, in]``, ``A_hat[(s, p, q), c] = A[p, c // k] * (c % k == q)``; ``B_hat [W, out]`` from B transposed.

    Args:
        A: ``[r, ceil(in / k_min)]``, B: ``[ceil(out / k_min), r]``, one dtype, any strides.
    """
    if A.dtype not in DTYPES:
        A, B = A.float(), B.float()
    columns, pyramid, _ = _pyramid(A.shape[0], scales, A)
    A_hat = torch.empty((columns, in_features), dtype=dtype, device=A.device)
    B_hat = torch.empty((columns, out_features), dtype=dtype, device=A.device)
    launch(
        "ept_interleave",
        A,
        pyramid,
        A.data_ptr(),
        *A.stride(),
        B.data_ptr(),
        B.stride(1),
        B.stride(0),
        A_hat.data_ptr(),
        B_hat.data_ptr(),
        in_features,
        out_features,
        DTYPES[A.dtype],
        DTYPES[dtype],
    )
    return A_hat, B_hat


def gather(
    grad_A_hat: Tensor | None,
    grad_B_hat: Tensor | None,
    rank: int,
    seed_width: int,
    seed_height: int,
    scales: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    """The adjoint of ``interleave``: ``grad_A [r, seed_width]``, ``grad_B [seed_height, r]``, fp32; None for None."""
    like = grad_B_hat if grad_A_hat is None else grad_A_hat
    if like is None:
        return None, None
    grad_A = grad_B = None
    in_features = out_features = a_dtype = b_dtype = 0
    if grad_A_hat is not None:
        grad_A_hat = grad_A_hat.contiguous()
        grad_A = torch.empty(rank, seed_width, dtype=torch.float32, device=like.device)
        in_features, a_dtype = grad_A_hat.shape[1], DTYPES[grad_A_hat.dtype]
    if grad_B_hat is not None:
        grad_B_hat = grad_B_hat.contiguous()
        grad_B = torch.empty(seed_height, rank, dtype=torch.float32, device=like.device)
        out_features, b_dtype = grad_B_hat.shape[1], DTYPES[grad_B_hat.dtype]
    launch(
        "ept_gather",
        like,
        _pyramid(rank, scales, like)[1],
        address(grad_A_hat),
        address(grad_B_hat),
        address(grad_A),
        address(grad_B),
        in_features,
        out_features,
        seed_width,
        seed_height,
        a_dtype,
        b_dtype,
    )
    return grad_A, grad_B


def _spans(rows: int, groups: int) -> tuple[int, int]:
    """How many spans of rows, and rows in each, are summed apart: enough to fill a GPU, few where groups do that."""
    spans = max(1, min(-(-rows // 32), 256, 4096 // max(groups, 1)))
    length = -(-rows // spans)
    return -(-rows // max(length, 1)) or 1, length


def _core(
    U: Tensor | None,
    dV: Tensor | None,
    folded: Tensor,
    groups: Tensor | None,
    active: Tensor | None,
    scales: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_V, need_dU, need_folded = needs
    if U is not None:
        U = U.contiguous()
    if dV is not None:
        dV = dV.contiguous()
    like = dV if U is None else U
    assert like is not None
    if dV is not None and dV.dtype != like.dtype:
        raise ValueError(f"dV must have the dtype of U, {like.dtype}, got {dV.dtype}")
    rows, columns = like.shape
    _, pyramid, _ = _pyramid(columns // sum(scales), scales, like)
    folded = folded.contiguous()
    count = folded.shape[0]
    V = torch.empty_like(like) if need_V else None
    dU = torch.empty_like(like) if need_dU else None
    rows_per_id, wide = 1, False
    if groups is not None:
        groups = groups.contiguous()
        rows_per_id, wide = rows // max(groups.shape[0], 1), groups.dtype == torch.int64
    if active is not None:
        active = active.contiguous()
    grad_folded = partial = None
    spans = length = 1
    if need_folded:
        grad_folded = torch.empty_like(folded)
        spans, length = _spans(rows, count)
        if spans > 1:
            partial = folded.new_empty(spans, *folded.shape)
    launch(
        "ept_core",
        like,
        pyramid,
        address(groups),
        rows_per_id,
        count,
        folded.data_ptr(),
        address(active),
        rows,
        address(U),
        address(V),
        address(dV),
        address(dU),
        address(grad_folded),
        address(partial),
        spans,
        length,
        wide,
        DTYPES[like.dtype],
    )
    return V, dU, grad_folded


def core(U: Tensor, folded: Tensor, groups: Tensor | None, active: Tensor | None, scales: Sequence[int]) -> Tensor:
    """``V[t, (s, p, a)] = sum_q Kbar_s[g(t)][a, q] U[t, (s, p, q)]``, ``[T, W]`` in the dtype of U.

    Zero where ``active`` says that a group does not use a scale: U is not read there. NaN in a row of a group that
    ``folded`` lacks.

    Args:
        U: ``[T, W]``. folded: ``[G, F]`` fp32. groups: ``[N]`` int64 or int32, each for T / N rows; None: group 0.
        active: ``[G, S]`` bool, or None.
    """
    V, _, _ = _core(U, None, folded, groups, active, scales, (True, False, False))
    assert V is not None
    return V


def core_backward(
    U: Tensor | None,
    dV: Tensor | None,
    folded: Tensor,
    groups: Tensor | None,
    active: Tensor | None,
    scales: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``V [T, W]`` again, its adjoint ``dU [T, W]`` and ``grad_folded [G, F]`` fp32, each where ``needs`` asks.

    U may be None where dU alone is wanted, dV where V alone is. The gradient sums in a fixed order; rows of a group
    that ``folded`` lacks add to none of it.
    """
    return _core(U, dV, folded, groups, active, scales, needs)


def dropout(x: Tensor, seed: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """x ``[T, n]`` with entries zeroed with probability ``p``, the others divided by 1 - p; added to ``onto`` in place.

    The mask depends on ``seed [1]`` (int64, on the device) and an entry's row and column alone: later calls replay it.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    if onto is not None and onto.stride(1) != 1:
        return onto.add_(dropout(x, seed, p))
    rows, columns = x.shape
    out = x.new_empty(rows, columns) if onto is None else onto
    launch(
        "ept_dropout",
        x,
        x.data_ptr(),
        out.data_ptr(),
        seed.data_ptr(),
        rows,
        x.stride(0),
        out.stride(0),
        columns,
        min(int(p * 2**32), 2**32 - 1),
        1 / (1 - p),
        onto is not None,
        DTYPES[x.dtype],
    )
    return out


_ops = Library(sys.modules[__name__])
pyramid_delta = _ops.pyramid_delta
pyramid_delta_backward = _ops.pyramid_delta_backward
pyramid_linear = _ops.pyramid_linear
pyramid_linear_backward = _ops.pyramid_linear_backward
pyramid_weight = _ops.pyramid_weight
pyramid_weight_backward = _ops.pyramid_weight_backward
