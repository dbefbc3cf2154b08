"""Backend ``triton``: fused kernels for GPUs, checked on a CPU through Triton's interpreter.

Importing this package needs no Triton; its kernels are imported by the first call that they serve.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

name = "triton"
fuses_dropout = True
keeps = True

_OPS = {"forward", "backward", "delta_weight", "delta_weight_backward", "folder"}
#: The first Triton whose kernels take compile-time tuples as these do.
OLDEST = (3, 4)
#: The oldest compute capability that tiles are checked for; before it there is no bf16 and no asynchronous copy.
CAPABILITY = (8, 0)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve ``dtype`` on ``device``, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if dtype not in _DTYPES:
        return f"it computes in {', '.join(str(each) for each in _DTYPES)}"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f"it needs Triton {wanted} or newer, found {triton.__version__} (pip install 'triton>={wanted}')"
    from triton import knobs

    if device.type != "cuda" and not (device.type == "cpu" and knobs.runtime.interpret):
        return "it runs on GPUs (on a CPU only in Triton's interpreter: TRITON_INTERPRET=1, slow, for tests)"
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            needed, has = (".".join(map(str, version)) for version in (CAPABILITY, found))
            return f"it needs compute capability {needed} or newer (Ampere), {device} has {has}"
    return None


def __getattr__(attribute: str) -> object:
    if attribute in _OPS:
        return getattr(importlib.import_module(".backend", __name__), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
