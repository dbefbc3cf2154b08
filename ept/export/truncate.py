"""The best approximation of a product of two thin factors at a lower rank, without forming the product."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_parts(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(U [out, m], S [m], V [m, in])`` in float64 with ``lora_B @ lora_A = U diag(S) V``, m at most their rank R.

    ``lora_B = Qb Rb`` and ``lora_A^T = Qa Ra`` leave a singular value problem of size R, not of size ``out x in``.
    """
    left, left_core = torch.linalg.qr(lora_B.double())
    right, right_core = torch.linalg.qr(lora_A.double().T)
    U, S, V = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ U, S, V @ right.T


def truncate(lora_A: Tensor, lora_B: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float, float]:
    """Factors of at most ``rank``, the norm of the exact product and the norm of what they lack of it (Frobenius).

    Factors that have that rank already, and all with ``rank=None``, are returned as they are. Singular values are
    shared evenly between the two.

    Args:
        lora_A ``[R, in]``, lora_B ``[out, R]``.
    """
    exact = min(lora_A.shape[0], *lora_A.shape[1:], lora_B.shape[0])
    if rank is None or exact == 0 or rank >= lora_A.shape[0]:
        norm = torch.linalg.norm(torch.linalg.qr(lora_B.double())[1] @ lora_A.double()) if exact else torch.zeros(())
        return lora_A, lora_B, norm.item(), 0.0
    U, S, V = singular_parts(lora_A, lora_B)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    A, B = root[:, None] * V[:kept], U[:, :kept] * root
    return A.to(lora_A.dtype), B.to(lora_B.dtype), torch.linalg.norm(S).item(), torch.linalg.norm(S[kept:]).item()
