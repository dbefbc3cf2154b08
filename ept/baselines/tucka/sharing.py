"""One route for a forward pass: the router's layer works it out, the others read it."""

from __future__ import annotations

from torch import Tensor

from ept.context import current

from .route import Route
from .router import CentroidRouter


def shared_route(router: CentroidRouter, x: Tensor, *, routes: bool, layer: str) -> Route | None:
    """The route of the pass under way, or None while the router has no centroids.

    The first call of the layer that ``routes`` decides; every later one in the pass reads. So does a whole generation:
    its first pass, over the prompt, decides for all tokens. A checkpointed part that is repeated during backward works
    the route out again from the same input (autograd wants the same tensors saved), uncounted.

    Args:
        x: input of the layer. routes: whether the layer is the router's. layer: its name, for the error.

    Raises:
        ValueError: no pass of an adapted model is under way, or the layer was called before the router's.
    """
    context = current()
    if context is None:
        raise ValueError(
            f"{layer} was called outside of a forward pass of its model; TuckA routes a whole batch once a pass: call "
            "the adapted model, or surround the call with ept.use_tasks"
        )
    if routes and (router not in context.shared or context.recomputes):
        route = router(x, context.attention_mask, count=not context.recomputes)
        if not context.recomputes:
            context.shared[router] = route
        return route
    if router not in context.shared:
        raise ValueError(
            f"{layer} was called before the layer that routes; set router_module={layer!r} in the config if it is the "
            "first adapted layer of a forward pass"
        )
    return context.shared[router]
