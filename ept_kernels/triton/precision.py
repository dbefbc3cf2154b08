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
    matmul = torch.backends.cuda.matmul
    # Once it is set, the newer of torch's two switches makes reading the older one an error.
    told = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if told else "tf32x3"
