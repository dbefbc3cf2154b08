"""How fp32 matrix products use the hardware."""

from __future__ import annotations

import torch
from triton import knobs


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: as exact as torch's own product would be.

    Full fp32 as three TF32 products on tensor cores (error about 1e-6), one where torch was told that TF32 will do.
    AMD's compiler takes fp32 directly.
    """
    if dtype != torch.float32 or knobs.runtime.interpret or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
