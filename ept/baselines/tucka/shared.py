"""What TuckA's layers share: one router, and the route of the forward pass under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ept.context import current
from ept.tasks import TaskNames

from .config import TuckAConfig
from .route import Route, fixed_route
from .router import CentroidRouter


class SharedRouter(TaskNames):
    """The router of an adapter, saved once with it, and which layer's input it sees.

    Args:
        config: the adapter's hyperparameters.
        width: of the input of the layer that routes. layer: that layer's name; without ``config.router_module`` a
            guess, until the first pass of the whole model shows which adapted layer is called first.
    """

    def __init__(
        self,
        config: TuckAConfig,
        width: int,
        layer: str,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config.num_tasks, config.task_names, device=device)
        self.layer, self.width = layer, width
        self._is_guess = config.router_module is None
        self.router = CentroidRouter(
            width, config.num_groups, config.group_size, config.centroid_noise, device=device, dtype=dtype
        )
        self.fixed: Route | None = None

    def reset_parameters(self) -> None:
        self.router.reset_parameters()

    def part_sizes(self) -> dict[str, int]:
        return {"centroids": self.router.centroids.numel()}

    def fix(self, group: int, weights: Sequence[float] | Tensor) -> None:
        """Route every batch alike from now on, until ``free``; the adapter can then be merged.

        Raises:
            ValueError: a group that does not exist, or another number of weights than experts in a group.
        """
        self.fixed = fixed_route(group, weights, self.router.num_groups, self.router.group_size, device=self.device)

    def free(self) -> None:
        """Route by the batch again."""
        self.fixed = None

    def route(self, x: Tensor, layer: str) -> Route | None:
        """The route of the pass under way, or None while the router has no centroids.

        The pass's first adapted layer decides, every later one reads. So does a whole generation: its first pass, over
        the prompt, decides for all tokens. A checkpointed part that is repeated during backward decides again from the
        same input, uncounted. Outside of any pass a layer that owns its router decides for itself.

        Args:
            x: input of the layer. layer: its name.

        Raises:
            ValueError: the first layer of the pass is not the one whose input the router knows.
        """
        if self.fixed is not None:
            return Route(*(part.to(x.device) for part in self.fixed))
        context = current()

        def decide() -> Route | None:
            if self._is_guess and context is not None and context.owner is not None:
                self._is_guess = False
                if x.shape[-1] == self.width:
                    self.layer = layer
            if layer != self.layer:
                raise ValueError(
                    f"{layer} was called before {self.layer}, which routes: call the adapted model, not a part of it, "
                    f"and set router_module={layer!r} in the config if that is the first adapted layer of its pass"
                )
            if context is None:
                return self.router(x)
            return self.router(x, context.attention_mask, count=not context.recomputes)

        return decide() if context is None else context.once(self, decide)


def routing_layer(names: Sequence[str], wanted: str | None) -> str:
    """Which of the adapted modules routes: the first, or the one that ``wanted`` names or ends.

    Raises:
        ValueError: none or several match ``wanted``.
    """
    if wanted is None:
        return names[0]
    matches = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    if len(matches) != 1:
        raise ValueError(
            f"router_module must name one adapted module, got {wanted!r}, which {len(matches)} of them match; "
            f"the first ones are {', '.join(names[:4])}"
        )
    return matches[0]
