"""First centroids of TuckA's router: around the mean token of the first batch, the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ept.ranks import number_of_ranks


def batch_sum(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum of the tokens that ``mask`` keeps, and their number. x ``[..., d]`` -> ``[d]``, ``[]``, both in ``dtype``.

    Args:
        mask: of the leading dimensions of x, 0 for padding; None, or one of another shape, keeps every token.
    """
    lead = x.shape[:-1]
    if mask is None or mask.shape != lead:
        tokens = torch.full((), lead.numel(), dtype=dtype, device=x.device)
    else:
        kept = mask.to(device=x.device, dtype=torch.bool)
        x, tokens = x.where(kept.unsqueeze(-1), 0), kept.sum().to(dtype)
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=dtype), tokens


def data_aware_centroids(total: Tensor, tokens: Tensor, count: int, noise: float) -> Tensor:
    """``E_0 = xbar`` and ``E_j = xbar + Uniform(-noise, noise)^d`` for j >= 1.

    In a ``torch.distributed`` job the noise is that of rank 0: it sends the finished centroids, so that all have the
    same bits. The default group of processes takes part; every one of them must see its first training batch in the
    same step. Noise comes from torch's generator on the device of ``total``.

    Args:
        total: ``[d]``, sum over the tokens of all ranks' batches. tokens: ``[]``, their number.

    Returns:
        ``[count, d]``.
    """
    mean = total / tokens.clamp_min(1)
    offsets = torch.empty(count, len(mean), dtype=mean.dtype, device=mean.device).uniform_(-noise, noise)
    offsets[0] = 0
    centroids = mean + offsets
    if number_of_ranks() > 1:
        dist.broadcast(centroids, src=0)
    return centroids
