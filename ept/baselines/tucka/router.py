"""TuckA's router: one for a model, one decision for a batch (arXiv 2511.06859)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ept_kernels import without_autocast

from ...ranks import number_of_ranks, sum_over_ranks


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
    """A route chosen by the caller, for merging; on ``device``, or where ``weights`` is.

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
    same step. Noise comes from torch's generator on the device of ``total``, which it leaves as it was.

    Args:
        total: ``[d]``, sum over the tokens of all ranks' batches. tokens: ``[]``, their number.

    Returns:
        ``[count, d]``.
    """
    mean = total / tokens.clamp_min(1)
    offsets = torch.empty(count, len(mean), dtype=mean.dtype, device=mean.device)
    if torch.compiler.is_compiling():  # a graph has no such context, and repeats no part of itself
        offsets.uniform_(-noise, noise)
    else:  # a checkpointed pass draws no centroids when it is repeated: what is drawn after them must not have moved
        with torch.random.fork_rng([mean.device] if mean.is_cuda else []):
            offsets.uniform_(-noise, noise)
    offsets[0] = 0
    centroids = mean + offsets
    if number_of_ranks() > 1:
        dist.broadcast(centroids, src=0)
    return centroids


class CentroidRouter(nn.Module):
    """Scores the mean token of a batch against one centroid for every expert, and picks the group of the best.

    ``a = E xbar`` as ``[K, t]``, each row divided by its 2-norm; ``sigmoid(a)`` are the scores. The group is that of
    the best score, and its t scores are the weights. Choosing a group has no gradient. The centroids learn through the
    weights alone: those of the chosen group from every adapted layer that uses the route, the others not in that step.

    In training the batch is that of all processes of a ``torch.distributed`` job, so that a run decides alike however
    many processes share a batch (**choice**: the released code decides per process); every one of them must run the
    same training passes. In evaluation each process decides for its own batch alone.

    The centroids come from the first batch seen in training (``centroids.data_aware_centroids``). Until then there is
    no route: ``forward`` in evaluation returns None, draws nothing, and the layers are their frozen bases. The flag
    is saved with the centroids, so a loaded router never draws them again.

    Args:
        dim: width d of the tokens that it sees. num_groups: K. group_size: t, experts in a group.
        noise: sigma, half the width of the uniform noise that sets the first centroids apart.

    Attributes:
        centroids: ``[K t, d]``, zeros until they are initialised.
        initialised: ``[]`` bool, saved.
        group_load: ``[K]`` int64, how often each group was chosen; counted on the device, not saved. Not a buffer:
            data-parallel training would overwrite it with rank 0's.
    """

    initialised: Tensor

    def __init__(
        self,
        dim: int,
        num_groups: int,
        group_size: int,
        noise: float,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_groups, self.group_size, self.noise = dim, num_groups, group_size, noise
        self.centroids = nn.Parameter(torch.zeros(num_groups * group_size, dim, device=device, dtype=dtype))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool, device=device))
        self.group_load = torch.zeros(num_groups, dtype=torch.int64)
        self._ready = False  # ``initialised`` as the host knows it: reading the buffer would stall a GPU's stream

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Drop the centroids, as after construction."""
        self.centroids.zero_()
        self.initialised.zero_()
        self.reset_group_load()
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether the centroids are initialised or loaded."""
        return self._ready

    def forward(self, x: Tensor, mask: Tensor | None = None, *, count: bool = True) -> Route | None:
        """Route a batch.

        Args:
            x: ``[..., d]``; every leading index is a token.
            mask: shape of the leading dimensions of x, 0 for padding, which takes no part. One of another shape (of
                cross attention, of a decoder) is ignored.
            count: whether ``group_load`` counts this batch.

        Returns:
            The route, or None where the centroids have not been initialised and this is not training.

        Raises:
            ValueError: x of another width.
        """
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [..., {self.dim}], the width of the router's centroids, got {list(x.shape)}")
        if not self._ready and not self.training:
            return None
        dtype = torch.promote_types(self.centroids.dtype, torch.float32)
        with without_autocast(x.device):
            total, tokens = batch_sum(x, mask, dtype)
            if self.training:
                sums = sum_over_ranks(torch.cat([total, tokens.view(1)]))
                total, tokens = sums[:-1], sums[-1]
            if not self._ready:
                self._initialise(total.detach(), tokens.detach())
            affinity = self.centroids.to(x.device, dtype) @ (total / tokens.clamp_min(1))
            affinity = affinity.view(self.num_groups, self.group_size)
            cosines = affinity / affinity.norm(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
            group = cosines.detach().amax(1).argmax().view(1)
            weights = cosines.index_select(0, group)[0].sigmoid()
        if count:
            with torch.no_grad():
                if self.group_load.device != group.device:
                    self.group_load = self.group_load.to(group.device)
                self.group_load += torch.arange(self.num_groups, device=group.device) == group
        return Route(group, weights)

    @torch.no_grad()
    def _initialise(self, total: Tensor, tokens: Tensor) -> None:
        self.centroids.copy_(data_aware_centroids(total, tokens, len(self.centroids), self.noise))
        self.initialised.fill_(True)
        self._ready = True

    def reset_group_load(self) -> None:
        """Set all counts to zero."""
        self.group_load = torch.zeros(self.num_groups, dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}initialised" in state_dict:
            self._ready = bool(state_dict[f"{prefix}initialised"])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_groups={self.num_groups}, group_size={self.group_size}, ready={self._ready}"
