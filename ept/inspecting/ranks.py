"""How many directions a matrix has, and how evenly it uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ept.export.factors import pyramid_factors
from ept_kernels import PyramidGeometry


@dataclass(frozen=True)
class Ranks:
    """Of a matrix with the singular values s, largest first.

    Attributes:
        rank: values above ``tolerance * s[0]``.
        stable: ``sum s^2 / s[0]^2``, from 1 to the rank; 0 for a zero matrix.
        entropy: ``exp(-sum p log p)`` with ``p = s / sum s``, from 1 to the rank (Roy and Vetterli's effective rank); 0
            for a zero matrix.
        norm: Frobenius norm.
    """

    rank: int
    stable: float
    entropy: float
    norm: float


def tolerance(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Share of the largest singular value below which one counts as zero: ``max(rows, columns) * eps`` of ``dtype``."""
    return max(rows, columns) * torch.finfo(dtype).eps


def ranks_of(matrix: Tensor, relative_tolerance: float) -> Ranks:
    """The ranks of ``matrix [m, n]``, computed in float64.

    Args:
        relative_tolerance: see ``tolerance``; that of the dtype in which the matrix was trained and stored.
    """
    values = torch.linalg.svdvals(matrix.double())
    largest = values.max().item() if values.numel() else 0.0
    if largest == 0.0:
        return Ranks(0, 0.0, 0.0, 0.0)
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Ranks(
        rank=int((values > relative_tolerance * largest).sum()),
        stable=(values.square().sum() / largest**2).item(),
        entropy=entropy.exp().item(),
        norm=values.square().sum().sqrt().item(),
    )


def update_core(A: Tensor, B: Tensor, folded: Tensor, geometry: PyramidGeometry) -> Tensor:
    """A small matrix with the singular values of one task's update ``sum_k (B_k A_k) kron Kbar_k``.

    The update is a product of two thin factors (``pyramid_factors``), so that its singular values are those of the
    product of their triangular factors: no ``[out, in]`` matrix is made.

    Args:
        A: ``[r, seed_width]``. B: ``[seed_height, r]``. folded: ``[folded_size]``, as ``ept_kernels.fold_kernels``.

    Returns:
        ``[n, n]`` in float64 with n at most ``r * sum`` of the scales in use; ``[1, 1]`` zeros where none is.
    """
    lora_A, lora_B = pyramid_factors(A.double(), B.double(), folded.double(), [True] * len(geometry.scales), geometry)
    if len(lora_A) == 0:
        return torch.zeros(1, 1, dtype=torch.float64)
    first = torch.linalg.qr(lora_B, mode="r").R
    second = torch.linalg.qr(lora_A.T, mode="r").R
    return first @ second.T
