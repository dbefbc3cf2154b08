"""The router and the fold on a GPU: from task embeddings to folded kernels in two launches, with gradients in three.

The same mathematics as ``fold_kernels`` behind a top-k softmax, which takes about twenty launches forward and twice as
many backward: more than the layer around it. Nothing waits for the device, and results are bit-identical in every run.
"""

from __future__ import annotations

from ..problem import RoutingStamp
from .fold_backward import fold_backward
from .fold_forward import fold

__all__ = ["MOST_EXPERTS", "fold", "fold_backward", "mark", "most_experts"]

#: More are left to the composition: programs compare all pairs of experts, in registers.
MOST_EXPERTS = 64
most_experts = MOST_EXPERTS
mark = RoutingStamp.of
