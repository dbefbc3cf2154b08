"""TuckA from its definition (arXiv 2511.06859), materialised and slow on purpose: the oracle of its tests.

Differentiable by ordinary autograd, float64 and all. Row vectors: ``y = (x + alpha x T) W^T + b`` with ``T = U M U^T``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over every token that is not padding. x ``[batch, sequence, d]``, mask ``[batch, sequence]`` -> ``[d]``."""
    kept = [
        x[sample, position]
        for sample in range(x.shape[0])
        for position in range(x.shape[1])
        if mask is None or mask[sample, position]
    ]
    return torch.stack(kept).mean(0)


def scores(centroids: Tensor, mean: Tensor, num_groups: int) -> Tensor:
    """Affinity of a batch to every expert. centroids ``[K t, d]``, mean ``[d]`` -> ``[K, t]``, each row by its norm."""
    affinity = torch.stack([centroid @ mean for centroid in centroids]).reshape(num_groups, -1)
    return torch.stack([torch.sigmoid(row / row.norm()) for row in affinity])


def route(centroids: Tensor, x: Tensor, num_groups: int, mask: Tensor | None = None) -> tuple[int, Tensor]:
    """The group that holds the best score, and that group's scores ``[t]``, not normalised."""
    all_scores = scores(centroids, batch_mean(x, mask), num_groups)
    best = int(all_scores.detach().reshape(-1).argmax())
    group = best // all_scores.shape[1]
    return group, all_scores[group]


def core(G: Tensor, C: Tensor, group: int, weights: Sequence[Tensor] | Tensor) -> Tensor:
    """``M = sum_i w_i sum_p C[i, p] G[g, p]``. G ``[K, p, r, r]``, C ``[t, p]`` -> ``[r, r]``."""
    slices, shares = G[group] / G[group].norm(), C / C.norm()
    total = torch.zeros_like(slices[0])
    for expert in range(C.shape[0]):
        for index in range(C.shape[1]):
            total = total + weights[expert] * shares[expert, index] * slices[index]
    return total


def transform(G: Tensor, U: Tensor, C: Tensor, group: int, weights: Sequence[Tensor] | Tensor) -> Tensor:
    """``T = U M U^T``, the dense ``[in, in]`` matrix that multiplies x from the right."""
    basis = U / U.norm()
    return basis @ core(G, C, group, weights) @ basis.T


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    G: Tensor,
    U: Tensor,
    C: Tensor,
    group: int,
    weights: Sequence[Tensor] | Tensor,
    alpha: float,
) -> Tensor:
    """The adapted layer, x ``[..., in]`` -> ``[..., out]``."""
    return F.linear(x + alpha * x @ transform(G, U, C, group, weights), weight, bias)
