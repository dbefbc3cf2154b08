"""The ops on Triton's small kernels, and the plan that adds the update to the base product."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from ..backends.gpu import Library, two_products
from . import fold as folder
from .core import core, core_backward
from .dropout import dropout
from .fused import fused
from .interleave import gather, interleave

__all__ = [
    "PLANS",
    "backward",
    "core",
    "core_backward",
    "delta_weight",
    "delta_weight_backward",
    "dropout",
    "folder",
    "forward",
    "gather",
    "interleave",
    "plan",
]

#: How the base product and the update are added; ``EPT_GPU_PLAN`` accepts these.
PLANS = ("library", "fused")


def plan() -> str:
    """``library``: two products of the vendor's library. ``fused``: our kernel, in half precision.

    No GPU has timed either yet, so the library's products are the default.

    Raises:
        ValueError: ``EPT_GPU_PLAN`` names no plan.
    """
    forced = os.environ.get("EPT_GPU_PLAN") or PLANS[0]
    if forced not in PLANS:
        raise ValueError(f"EPT_GPU_PLAN must be one of {', '.join(PLANS)}, or unset, got {forced!r}")
    return forced


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, V: Tensor, hat: Tensor) -> Tensor:
    if plan() == "fused" and x.dtype in (torch.float16, torch.bfloat16) and len(x):
        return fused(x, weight, bias, V, hat)
    return two_products(x, weight, bias, V, hat)


_ops = Library(sys.modules[__name__], _products)
forward, backward = _ops.forward, _ops.backward
delta_weight, delta_weight_backward = _ops.delta_weight, _ops.delta_weight_backward
