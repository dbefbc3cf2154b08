"""Native CPU backend: structured kernels of ``csrc/cpu`` around PyTorch's base product, fp32 and bf16.

The update costs what a LoRA of rank r costs for each scale. Forward writes ``bias + update`` into the output and the
base product adds itself (``addmm`` with beta = 1): the update takes the place of the pass that would have written the
bias. Backward does the same with the gradient of x. Scales whose folded kernels are zero are skipped, except for the
gradient of those kernels where ``active`` does not say that nobody wants it. Sums over rows go by thread, then in the
order of the threads: results are the same to the bit for the same number of threads.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .torch_backend import pyramid_weight, pyramid_weight_backward

__all__ = [
    "build_info",
    "name",
    "pyramid_delta",
    "pyramid_delta_backward",
    "pyramid_linear",
    "pyramid_linear_backward",
    "pyramid_weight",
    "pyramid_weight_backward",
    "select_instruction_set",
    "unsupported",
]

name = "cpu"

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
        module = importlib.import_module("._C", __package__)
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


def _rows(x: Tensor) -> Tensor:
    """x with unit stride inside a row; rows may lie any distance apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _plain(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor  # the usual case, without two calls that do nothing
    return tensor.to(torch.float32).contiguous()


_Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _dense(x: Tensor, A: Tensor, B: Tensor, folded: Tensor, groups: Tensor | None, active: Tensor | None) -> _Operands:
    """The operands as C++ reads them, copied where they are not so already."""
    if groups is not None:
        groups = groups.to(torch.int64).contiguous()
    if active is not None:
        active = active.contiguous()
    return _rows(x), _plain(A), _plain(B), _plain(folded), groups, active


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _problem(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    out_features: int,
    scales: Sequence[int],
    active: Tensor | None,
) -> Any:
    """What forward and backward share, for C++. It holds addresses: the tensors must outlive it."""
    rows, in_features = x.shape
    return module().Problem(
        x.dtype is torch.bfloat16,
        in_features,
        out_features,
        A.shape[0],
        scales,
        x.data_ptr(),
        x.stride(0),
        rows,
        A.data_ptr(),
        B.data_ptr(),
        folded.data_ptr(),
        folded.shape[0],
        _address(groups),
        0 if groups is None else groups.shape[0],
        _address(active),
    )


def _update(
    y: Tensor,
    start: Tensor | None,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    active: Tensor | None,
) -> None:
    """``y = start + update``, ``start [out]`` or None for zeros."""
    x, A, B, folded, groups, active = _dense(x, A, B, folded, groups, active)
    problem = _problem(x, A, B, folded, groups, y.shape[1], scales, active)
    problem.forward(y.data_ptr(), y.stride(0), False, _address(start))


def pyramid_delta(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    out_features: int,
    scales: Sequence[int],
    active: Tensor | None = None,
) -> Tensor:
    y = x.new_empty(x.shape[0], out_features)
    _update(y, None, x, A, B, folded, groups, scales, active)
    return y


def pyramid_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    active: Tensor | None = None,
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    _update(y, None if bias is None else bias.contiguous(), x, A, B, folded, groups, scales, active)
    return y.addmm_(x, weight.T)


def pyramid_delta_backward(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
    active: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A, B, folded, each only where ``needs`` asks. U is recomputed: x is all that forward saves."""
    grad, dtypes = _rows(grad), (A.dtype, B.dtype, folded.dtype)
    x, A, B, folded, groups, active = _dense(x, A, B, folded, groups, active)
    need_x, *need_sums = needs
    grad_x = torch.empty_like(x) if need_x else None
    sums = [
        torch.empty_like(operand) if need else None for operand, need in zip((A, B, folded), need_sums, strict=True)
    ]
    _problem(x, A, B, folded, groups, grad.shape[1], scales, active).backward(
        grad.data_ptr(),
        grad.stride(0),
        _address(grad_x),
        0 if grad_x is None else grad_x.stride(0),
        False,
        *map(_address, sums),
    )
    grad_A, grad_B, grad_folded = (
        s if s is None or s.dtype is dtype else s.to(dtype) for s, dtype in zip(sums, dtypes, strict=True)
    )
    return grad_x, grad_A, grad_B, grad_folded


def pyramid_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
    active: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    grad_x, grad_A, grad_B, grad_folded = pyramid_delta_backward(grad, x, A, B, folded, groups, scales, needs, active)
    if grad_x is not None:
        grad_x.addmm_(grad, weight)
    return grad_x, grad_A, grad_B, grad_folded
