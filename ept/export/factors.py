"""One task's update of one layer as two LoRA factors: ``W = lora_B @ lora_A``.

EPT: with ``Kbar_k`` the task's folded kernel of scale k (spec identity 2),

    (B_k A_k) kron Kbar_k = (B_k kron Kbar_k) (A_k kron I_k),

a product of ``[out, r k]`` and ``[r k, in]`` after the crop. Scales stand side by side: the rank is r times the sum of
the active k.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from ept_kernels import PyramidGeometry, fold_kernels

from ..baselines.dcft import DCFTAdapter
from ..baselines.low_rank import DiagonalAdapter
from ..layer_adapter import LayerAdapter
from ..pyramid.adapter import PyramidAdapter


@singledispatch
def lora_factors(adapter: LayerAdapter, task: int) -> tuple[Tensor, Tensor]:
    """``(lora_A [R, in], lora_B [out, R])`` of one resolved task, with all scaling in them, in the adapter's dtype.

    R is 0 where the task has no update here.

    Raises:
        ValueError: a method that has no such factors.
    """
    raise ValueError(f"{type(adapter).__name__} has no exact LoRA factors; EPT, DCFT, MoRE and MOELoRA have")


@lora_factors.register
def _(adapter: PyramidAdapter, task: int) -> tuple[Tensor, Tensor]:
    folded, _, active = adapter.fold(task)
    return pyramid_factors(adapter.A, adapter.B, folded[0], active.reshape(-1).tolist(), adapter.geometry)


@lora_factors.register
def _(adapter: DCFTAdapter, task: int) -> tuple[Tensor, Tensor]:
    return pyramid_factors(adapter.A, adapter.B, dcft_folded(adapter), [True], adapter.geometry)


@lora_factors.register
def _(adapter: DiagonalAdapter, task: int) -> tuple[Tensor, Tensor]:
    core = adapter.core(task)[0].to(adapter.A.dtype)
    used = core != 0
    return adapter.A[used], adapter.scaling * adapter.B[:, used] * core[used]


def dcft_folded(adapter: DCFTAdapter) -> Tensor:
    """DCFT's kernel as EPT folds its own: ``[k * k]``."""
    return fold_kernels([adapter.c], adapter.c.new_ones(1, 1), adapter.scaling, adapter.geometry)[0]


def pyramid_factors(
    A: Tensor, B: Tensor, folded: Tensor, active: list[bool], geometry: PyramidGeometry
) -> tuple[Tensor, Tensor]:
    """Factors of a pyramid of scales; a scale that is not active, or whose kernel is zero, takes no rank.

    Args:
        A ``[r, w]``, B ``[h, r]``: the seed. folded: ``[folded_size]``. active: one for each of ``geometry.scales``.
    """
    rows, columns = [A.new_empty(0, geometry.in_features)], [B.new_empty(geometry.out_features, 0)]
    sizes = zip(geometry.scales, geometry.widths, geometry.heights, geometry.offsets, active, strict=True)
    for k, width, height, offset, is_active in sizes:
        kernel = folded[offset : offset + k * k].view(k, k).to(A.dtype)
        if is_active and kernel.any():
            unit = torch.eye(k, dtype=A.dtype, device=A.device)
            rows.append(torch.kron(A[:, :width], unit)[:, : geometry.in_features])
            columns.append(torch.kron(B[:height], kernel)[: geometry.out_features])
    return torch.cat(rows), torch.cat(columns, dim=1)
