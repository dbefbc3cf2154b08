"""The folder that ``export_deltas`` writes and ``load_deltas`` reads: file names, manifest, fingerprints.

``deltas.json`` lists tasks and layers; ``seed.safetensors`` holds ``<layer>.A`` and ``<layer>.B`` once for all tasks;
``task-<i>.safetensors`` holds the folded kernels of the i-th task, ``<layer> [sum of k * k]``, and its head, if it has
one outside the model, as ``head/<name>``; ``modules.safetensors`` holds other trained modules of the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ept_kernels import PyramidGeometry

FORMAT = 1
MANIFEST, SEED, MODULES = "deltas.json", "seed.safetensors", "modules.safetensors"
HEAD = "head/"
_SAMPLED = 4096  # elements that tell a weight from another; all of them would cost seconds a gigabyte


def task_file(index: int) -> str:
    """Name of the file of the i-th task in the manifest."""
    return f"task-{index}.safetensors"


@dataclass(frozen=True)
class LayerEntry:
    """A layer in the manifest.

    Attributes:
        in_features, out_features, rank, scales: its geometry. Every scaling factor is in the folded kernels.
        transposed: whether the base stores ``[in, out]`` (GPT-2's ``Conv1D``).
        base: fingerprint of the base's weight; None for one that is not a dense float.
    """

    in_features: int
    out_features: int
    rank: int
    scales: tuple[int, ...]
    transposed: bool
    base: str | None

    @property
    def geometry(self) -> PyramidGeometry:
        return PyramidGeometry(self.in_features, self.out_features, self.rank, tuple(self.scales))


def fingerprint(weight: Tensor) -> str:
    """Dtype, shape and a hash of up to 4096 elements spread over a weight: another base, or a merged one, differs."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu().view(torch.uint8)
    digest = hashlib.blake2b(sample.numpy().tobytes(), digest_size=8).hexdigest()
    return f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)} {digest}"
