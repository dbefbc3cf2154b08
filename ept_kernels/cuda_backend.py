"""CUDA C++ backend: the kernels of ``csrc/cuda`` beside torch's own GEMM, for float32, float16 and bfloat16 rows.

Rows keep their dtype, A, B and the folded kernels are read as fp32, sums are fp32. The library ``_cuda.so`` is built by
``setup.py`` or CMake and loaded when a CUDA tensor first asks for it: importing this module needs neither.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

name = "cuda"

LIBRARY = Path(__file__).with_name("_cuda.so")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The oldest compute capability that the kernels are written for.
CAPABILITY = (7, 5)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@functools.cache
def _load(library: Path) -> str | None:
    """Register ``torch.ops.ept_cuda``; None, or why that failed. Tried once."""
    if not library.exists():
        return f"{library.name} has not been built; build it with EPT_BUILD_CUDA=1 pip install ."
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load in torch {torch.__version__}: {error}"
    return None


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
    return _load(LIBRARY)


def build_info(library: Path = LIBRARY) -> dict[str, str | list[str]]:
    """What the library is: ``architectures`` that it was compiled for, such as "8.0", and ``compiler``.

    Raises:
        RuntimeError: there is no library, or it does not load; the message says why.
    """
    if (reason := _load(library)) is not None:
        raise RuntimeError(reason)
    text = ctypes.CDLL(str(library)).ept_cuda_build_info
    text.restype = ctypes.c_char_p
    compiled, compiler = text().decode().split(";")
    return {
        "architectures": [f"{int(a) // 100}.{int(a) % 100 // 10}" for a in compiled.split(",") if a],
        "compiler": compiler,
    }


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    """Rows may be strided, the numbers of a row may not."""
    return x if x.stride(1) == 1 else x.contiguous()


def _groups(groups: Tensor | None) -> Tensor | None:
    return None if groups is None else groups.contiguous()


def _asked(gradients: Sequence[Tensor], needs: Sequence[bool], like: Sequence[Tensor]) -> Gradients:
    grad_A, grad_B, grad_folded = (
        gradient.to(tensor.dtype) if need else None
        for gradient, need, tensor in zip(gradients, needs, like, strict=True)
    )
    return grad_A, grad_B, grad_folded


def pyramid_delta(
    x: Tensor, A: Tensor, B: Tensor, folded: Tensor, groups: Tensor | None, out_features: int, scales: Sequence[int]
) -> Tensor:
    y = x.new_empty(x.shape[0], out_features)
    torch.ops.ept_cuda.delta_(y, _rows(x), _fp32(A), _fp32(B), _fp32(folded), _groups(groups), scales, False)
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
) -> Tensor:
    y = F.linear(x, weight, bias)
    torch.ops.ept_cuda.delta_(y, _rows(x), _fp32(A), _fp32(B), _fp32(folded), _groups(groups), scales, True)
    return y


def _delta_backward(
    grad_x: Tensor | None,
    accumulate: bool,
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of A, B, folded; that of x goes, or is added, into ``grad_x``. U is recomputed from x."""
    gradients = torch.ops.ept_cuda.delta_backward_(
        grad_x,
        _rows(grad),
        _rows(x),
        _fp32(A),
        _fp32(B),
        _fp32(folded),
        _groups(groups),
        scales,
        accumulate,
        *needs,
    )
    return _asked(gradients, needs, (A, B, folded))


def pyramid_delta_backward(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    folded: Tensor,
    groups: Tensor | None,
    scales: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    grad_x = x.new_empty(x.shape) if needs[0] else None
    return grad_x, *_delta_backward(grad_x, False, grad, x, A, B, folded, groups, scales, needs[1:])


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    grad_x = (grad @ weight).contiguous() if needs[0] else None
    return grad_x, *_delta_backward(grad_x, True, grad, x, A, B, folded, groups, scales, needs[1:])


def pyramid_weight(
    A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]
) -> Tensor:
    weight = torch.ops.ept_cuda.weight(_fp32(A), _fp32(B), _fp32(folded), in_features, out_features, scales, None)
    return weight.to(A.dtype)


def pyramid_weight_backward(
    grad: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    gradients = torch.ops.ept_cuda.weight_backward(_fp32(grad), _fp32(A), _fp32(B), _fp32(folded), scales, *needs)
    return _asked(gradients, needs, (A, B, folded))


def pyramid_merge(weight: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int]) -> Tensor:
    """``weight + sum_k crop((B_k A_k) kron Kbar_k[g])`` for every group, added in fp32 and rounded once."""
    out_features, in_features = weight.shape
    return torch.ops.ept_cuda.weight(
        _fp32(A), _fp32(B), _fp32(folded), in_features, out_features, scales, weight.contiguous()
    )
