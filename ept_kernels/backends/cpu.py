"""Native CPU backend: structured kernels of ``csrc/cpu`` around PyTorch's base product, fp32 and bf16.

The update costs what a LoRA of rank r costs for each scale. Forward writes ``bias + update`` into the output and the
base product adds itself (``addmm`` with beta = 1): the update takes the place of the pass that would have written the
bias. Backward does the same with the gradient of x. Scales whose folded kernels are zero are skipped, except for the
gradient of those kernels where ``active`` does not say that nobody wants it. Sums over rows go by thread, then in the
order of the threads: results are bit-identical for the same number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem import Base, Gradients, Kept, Output, Problem
from . import cpu_fold as folder
from .cpu_library import build_info, module, select_instruction_set, unsupported
from .torch import delta_weight, delta_weight_backward

__all__ = [
    "backward",
    "build_info",
    "delta_weight",
    "delta_weight_backward",
    "folder",
    "forward",
    "fuses_dropout",
    "keeps",
    "name",
    "select_instruction_set",
    "unsupported",
]

name = "cpu"
fuses_dropout = False
keeps = False


def _rows(x: Tensor) -> Tensor:
    """x with unit stride inside a row; rows may lie any distance apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _plain(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor  # the usual case, without two calls that do nothing
    return tensor.to(torch.float32).contiguous()


def _dense(problem: Problem) -> Problem:
    """The operands as C++ reads them, copied where they are not so already."""
    x, A, B, folded, groups, active, *_ = problem
    if groups is not None:
        groups = groups.to(torch.int64).contiguous()
    if active is not None:
        active = active.contiguous()
    return Problem(_rows(x), _plain(A), _plain(B), _plain(folded), groups, active, *problem[6:])


def address(tensor: Tensor | None) -> int:
    """What native code gets for a tensor; null for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _native(problem: Problem) -> Any:
    """A call for C++. It holds addresses: the tensors of ``problem``, which ``_dense`` made, must outlive it."""
    x, A, B, folded, groups, active, out_features, scales, *_ = problem
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
        address(groups),
        0 if groups is None else groups.shape[0],
        address(active),
    )


def forward(problem: Problem, base: Base | None, save: bool = False, kept: Kept | None = None) -> Output:
    x = problem.x
    y = x.new_empty(x.shape[0], problem.out_features)
    bias = None if base is None or base.bias is None else base.bias.contiguous()
    dense = _dense(problem)
    _native(dense).forward(y.data_ptr(), y.stride(0), False, address(bias))
    return Output(y if base is None else y.addmm_(x, base.weight.T))


def backward(
    grad: Tensor, problem: Problem, weight: Tensor | None, needs: Sequence[bool], saved: Sequence[Tensor] = ()
) -> Gradients:
    """U is recomputed: x is all that forward saves."""
    rows, dense = _rows(grad), _dense(problem)
    need_x, *need_sums = needs
    grad_x = torch.empty_like(dense.x) if need_x else None
    sums = [torch.empty_like(operand) if need else None for operand, need in zip(dense[1:4], need_sums, strict=True)]
    _native(dense).backward(
        rows.data_ptr(),
        rows.stride(0),
        address(grad_x),
        0 if grad_x is None else grad_x.stride(0),
        False,
        *map(address, sums),
    )
    if grad_x is not None and weight is not None:
        grad_x.addmm_(grad, weight)
    grad_A, grad_B, grad_folded = (
        s if s is None or s.dtype is operand.dtype else s.to(operand.dtype)
        for s, operand in zip(sums, problem[1:4], strict=True)
    )
    return grad_x, grad_A, grad_B, grad_folded
