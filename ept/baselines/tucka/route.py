"""What TuckA's router decides for a batch and every adapted layer reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """One group and the weights of its experts, on the device: nothing here is read by the host.

    Attributes:
        group: ``[1]`` int64, the chosen group. An index: it has no gradient.
        weights: ``[t]``, at least fp32, the scores of that group's experts; not normalised. The centroids learn through
            these alone.
    """

    group: Tensor
    weights: Tensor


def fixed_route(
    group: int,
    weights: Sequence[float] | Tensor,
    num_groups: int,
    group_size: int,
    *,
    device: torch.device | None = None,
) -> Route:
    """A route that no batch chose, for merging; on ``device``, or where ``weights`` is.

    Raises:
        ValueError: a group that does not exist, or another number of weights than experts in a group.
    """
    if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group < num_groups:
        raise ValueError(f"group must be an integer from 0 to {num_groups - 1}, got {group!r}")
    weights = torch.as_tensor(weights, device=device)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if weights.shape != (group_size,):
        raise ValueError(f"weights must hold {group_size} numbers, one for each expert of a group, got {weights!r}")
    return Route(torch.tensor([group], device=weights.device), weights)
