"""TuckA's router: one for a model, one decision for a batch (arXiv 2511.06859)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ept.ranks import sum_over_ranks
from ept_kernels import without_autocast

from .centroids import batch_sum, data_aware_centroids
from .route import Route


class CentroidRouter(nn.Module):
    """Scores the mean token of a batch against one centroid for every expert, and picks the group of the best.

    ``a = E xbar`` as ``[K, t]``, each row divided by its 2-norm; ``sigmoid(a)`` are the scores. The group is that of
    the best score, and its t scores are the weights. Choosing a group has no gradient. The centroids learn through the
    weights alone: those of the chosen group from every adapted layer that uses the route, the others not in that step.

    In training the batch is that of all processes of a ``torch.distributed`` job, so that a run decides alike however
    many processes share a batch (**choice**: the released code decides per process); every one of them must run the
    same training passes. In evaluation each process decides for its own batch and waits for nobody.

    The centroids come from the first batch seen in training (``centroids.data_aware_centroids``). Until then there is
    no route: ``forward`` in evaluation returns None, draws nothing, and the layers are their frozen bases. The flag
    is saved with the centroids, so a loaded router never draws them anew.

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
        """As it was made: without centroids."""
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
        """Count anew."""
        self.group_load = torch.zeros(self.num_groups, dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}initialised" in state_dict:
            self._ready = bool(state_dict[f"{prefix}initialised"])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_groups={self.num_groups}, group_size={self.group_size}, ready={self._ready}"
