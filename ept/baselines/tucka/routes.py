"""Routes of an adapted model, from outside: how often each group was chosen, and fixing one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ept.tuner.model import ept_model

from .shared import SharedRouter


def _shared(model: nn.Module, adapter_name: str | None) -> SharedRouter:
    tuner = ept_model(model)
    shared = tuner.ept_task_tables[adapter_name or tuner.active_adapters[0]]
    if not isinstance(shared, SharedRouter):
        raise ValueError("model must have a TuckA adapter: the one asked for is of another method")
    return shared


def group_load(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """How often each group was chosen since the model was made: ``[K]`` int64, on the router's device.

    Counted there without a host synchronisation, in training and evaluation; reading the result is one.

    Raises:
        ValueError: no TuckA adapter.
    """
    return _shared(model, adapter_name).router.group_load.clone()


def fix_route(model: nn.Module, group: int, weights: Sequence[float] | Tensor, adapter_name: str | None = None) -> None:
    """Treat every batch as if the router had chosen ``group`` with ``weights`` ``[t]``, until ``free_route``.

    The model is then one dense model, and ``merge_adapter`` and ``merge_and_unload`` serve.

    Raises:
        ValueError: no TuckA adapter, a group that does not exist, or another number of weights than experts in a group.
    """
    _shared(model, adapter_name).fix(group, weights)


def free_route(model: nn.Module, adapter_name: str | None = None) -> None:
    """Route by the batch again. A merged adapter stays merged until it is unmerged.

    Raises:
        ValueError: no TuckA adapter.
    """
    _shared(model, adapter_name).free()
