"""Token-level routing: every row of x selects its own experts, by a gate on x itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ept_kernels import PyramidGeometry, fold_tasks

from .router import fold_routed, route

UNMERGEABLE = (
    "EPT with routing='token' chooses experts for every token, so no one weight does what it does: it can be neither "
    "merged nor exported; unload() gives the base model back"
)

#: Rows up to which one native call (on one thread) routes and folds faster than a dozen tensor operations.
FUSED_ROWS = 512


def rows_of(x: Tensor, in_features: int) -> Tensor:
    """x ``[..., in]`` as ``[T, in]``.

    Raises:
        ValueError: x of another width, or not a floating-point tensor.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., in_features={in_features}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
    return x.reshape(-1, in_features)


def fold_tokens(
    x: Tensor, gate: Tensor, kernels: Sequence[Tensor], top_k: int, scaling: float, geometry: PyramidGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Folded kernels of every row, one group a row: ``(folded [T, folded_size], groups [T], active [T, S])``.

    With the default pyramid that is 120 numbers a row, in the dtype of the gate, where task routing has 120 a task.

    Args:
        x: ``[..., in]``, any floating dtype: what the layer is given, before dropout.
        gate: ``[E, in]``. kernels, scaling, geometry: as ``fold_kernels``. top_k: experts a row selects, 1 to E.

    Returns:
        As the ops take them; ``folded`` is differentiable in x, gate and kernels.

    Raises:
        ValueError: x of another width, or not a floating-point tensor.
    """
    rows = rows_of(x, geometry.in_features)
    groups = torch.arange(rows.shape[0], device=x.device)
    if not torch.compiler.is_compiling() and gate.is_cpu and 0 < rows.shape[0] <= FUSED_ROWS:
        # To this call the rows are a table of tasks.
        fused = fold_tasks(gate, rows, None, kernels, top_k, scaling, geometry)
        if fused is not None:
            return fused[0], groups, fused[1]
    folded, active = fold_routed(kernels, *route(gate, rows, top_k), scaling, geometry)
    return folded, groups, active
