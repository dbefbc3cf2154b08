"""How fp32 matrix products use the hardware."""

from __future__ import annotations

import torch
from triton import knobs

from .target import is_amd


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: as exact as torch's own product would be.

    Full fp32 as three TF32 products on tensor cores (error about 1e-6), one where torch was told that TF32 will do.
    AMD's matrix instructions take fp32 directly.
    """
    if dtype != torch.float32 or knobs.runtime.interpret or is_amd():
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
