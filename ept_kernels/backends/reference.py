"""``EPT_BACKEND=reference``: the definition behind the ops, dense updates and all. Slow; for checking other backends.

Forward calls ``reference.py``. Backward is written out from the same definition: the gradient of a dense update, pulled
back through the deconvolution with ``conv2d`` (its adjoint) one scale at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..folding import mask_inactive
from ..geometry import PyramidGeometry
from ..problem import Base, Gradients, Kept, Output, Problem

name = "reference"
fuses_dropout = False
keeps = False
folder = None


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _geometry(A: Tensor, in_features: int, out_features: int, scales: Sequence[int]) -> PyramidGeometry:
    return PyramidGeometry(in_features, out_features, A.shape[0], tuple(scales))


def delta_weight(
    A: Tensor, B: Tensor, folded: Tensor, in_features: int, out_features: int, scales: Sequence[int]
) -> Tensor:
    return reference.pyramid_weight(A, B, folded, _geometry(A, in_features, out_features, scales))


def forward(problem: Problem, base: Base | None, save: bool = False, kept: Kept | None = None) -> Output:
    x, A, B, folded, groups, _, out_features, scales, *_ = problem
    delta = reference.pyramid_delta(x, A, B, folded, groups, _geometry(A, x.shape[1], out_features, scales))
    return Output(delta if base is None else F.linear(x, *base) + delta)


def delta_weight_backward(
    grad: Tensor, A: Tensor, B: Tensor, folded: Tensor, scales: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _, out_features, in_features = grad.shape
    geometry = _geometry(A, in_features, out_features, scales)
    grad_A, grad_B, grad_folded = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(folded)
    for group in range(len(folded)):
        for scale, k in enumerate(geometry.scales):
            width, height, start = geometry.widths[scale], geometry.heights[scale], geometry.offsets[scale]
            kernel = folded[group, start : start + k * k].view(k, k).to(A.dtype)
            padded = F.pad(grad[group], (0, width * k - in_features, 0, height * k - out_features))
            seed_grad = F.conv2d(padded[None, None], kernel[None, None], stride=k)[0, 0]  # [height, width]
            grad_A[:, :width] += B[:height].T @ seed_grad
            grad_B[:height] += seed_grad @ A[:, :width].T
            seed = B[:height] @ A[:, :width]
            kernel_grad = torch.einsum("iajq,ij->aq", padded.view(height, k, width, k), seed)
            grad_folded[group, start : start + k * k] = kernel_grad.reshape(-1)
    need_A, need_B, need_folded = needs
    return grad_A if need_A else None, grad_B if need_B else None, grad_folded if need_folded else None


def backward(
    grad: Tensor, problem: Problem, weight: Tensor | None, needs: Sequence[bool], saved: Sequence[Tensor] = ()
) -> Gradients:
    x, A, B, folded, groups, active, out_features, scales, *_ = problem
    row_group = reference.row_groups(len(x), groups, x.device)
    grad_x = None
    if needs[0]:
        dense = reference.pyramid_weight(A, B, folded, _geometry(A, x.shape[1], out_features, scales)).to(x.dtype)
        grad_x = torch.einsum("to,toi->ti", grad, dense[row_group])
        if weight is not None:
            grad_x = grad_x + grad @ weight
    member = (row_group[None] == torch.arange(len(folded), device=x.device)[:, None]).to(x.dtype)  # [G, T]
    grad_weight = torch.einsum("gt,to,ti->goi", member, grad, x).to(A.dtype)
    grad_A, grad_B, grad_folded = delta_weight_backward(grad_weight, A, B, folded, scales, needs[1:])
    if grad_folded is not None and active is not None:
        grad_folded = mask_inactive(grad_folded, active, scales)
    return grad_x, grad_A, grad_B, grad_folded
