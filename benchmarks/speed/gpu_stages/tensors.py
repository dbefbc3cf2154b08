"""Random tensors of an adapted layer, and the ways to compute it here; needs neither PEFT nor ``ept``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_kernels import PyramidGeometry, dispatch, pyramid_linear

PAPER = (2, 2, 4, 4, 6, 6, 8, 8)
RANK = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
HALF = (torch.bfloat16, torch.float16)
PROVIDERS = {
    "torch": "ept_kernels.backends.torch",
    "triton": "ept_kernels.triton.backend",
    "cuda": "ept_kernels.backends.cuda",
}


def _served(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends but the reference; on a CPU Triton's interpreter serves a dry run, but its bf16 is wrong."""
    names = dispatch.available_backends(device, dtype)
    wrong = {"triton"} if device.type == "cpu" and dtype == torch.bfloat16 else set()
    return [name for name in names if name not in {"reference", *wrong}]


def ways(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What serves ``dtype`` on ``device``, as ``harness.forced_backend`` takes it: BACKEND or BACKEND:PLAN."""
    found = []
    for name in _served(device, dtype):
        plans = ("library", "fused") if dtype in HALF else ("library",)
        found += [f"{name}:{plan}" for plan in plans] if name == "triton" else [name]
    return found


def providers(device: torch.device, dtype: torch.dtype) -> dict[str, ModuleType]:
    """The modules with the small kernels of each backend that serves ``dtype`` on ``device``."""
    served = _served(device, dtype)
    return {name: importlib.import_module(module) for name, module in PROVIDERS.items() if name in served}


@dataclass(frozen=True)
class Layer:
    """``x [samples, length, in]``, ``weight [out, in]``, A, B, ``folded [G, F]`` in fp32, ``groups [samples]``.

    Outputs are of order one, as in a trained layer, so that fp16 does not overflow.
    """

    geometry: PyramidGeometry
    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    folded: Tensor
    groups: Tensor | None
    cotangent: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """x, A, B and folded, in their own dtypes or another."""
        tensors = (self.x, self.A, self.B, self.folded)
        return [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]

    def forward(self, x: Tensor, A: Tensor, B: Tensor, folded: Tensor) -> Tensor:
        """By the backend that is forced, or chosen."""
        return pyramid_linear(x, self.weight, None, A, B, folded, self.groups, self.geometry)

    def definition(self, x: Tensor, A: Tensor, B: Tensor, folded: Tensor) -> Tensor:
        """By dense updates, sample by sample. ``torch.kron`` deconvolves: a convolution may be TF32 on a GPU."""
        dense = [self._update(A, B, packed).to(x.dtype) for packed in folded]
        groups = [0] * len(x) if self.groups is None else self.groups.tolist()
        delta = [rows @ dense[group].T for rows, group in zip(x, groups, strict=True)]
        return F.linear(x, self.weight.to(x.dtype)) + torch.stack(delta)

    def _update(self, A: Tensor, B: Tensor, packed: Tensor) -> Tensor:
        """``sum_k crop((B_k A_k) kron Kbar_k)``, ``[out, in]``, for one row of folded kernels."""
        g = self.geometry
        total = A.new_zeros(g.out_features, g.in_features)
        for k, width, height, start in zip(g.scales, g.widths, g.heights, g.offsets, strict=True):
            kernel = packed[start : start + k * k].view(k, k)
            total = total + torch.kron(B[:height] @ A[:, :width], kernel)[: g.out_features, : g.in_features]
        return total

    def evaluate(self, function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        """Output and gradients of x, A, B, folded."""
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.cotangent.to(output.dtype))]


def build(
    device: torch.device,
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    samples: int,
    length: int,
    groups: int = 1,
    seed: int = 0,
) -> Layer:
    """Random tensors; sample i is of group ``i % groups``, and with one group there is no table."""
    g = PyramidGeometry(in_features, out_features, RANK, PAPER)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator, device=device)

    return Layer(
        geometry=g,
        x=normal(samples, length, in_features).to(dtype),
        weight=normal(out_features, in_features, std=in_features**-0.5).to(dtype),
        A=normal(RANK, g.seed_width, std=g.seed_width**-0.5),
        B=normal(g.seed_height, RANK, std=RANK**-0.5),
        folded=normal(groups, g.folded_size, std=0.5),
        groups=None if groups == 1 else torch.arange(samples, device=device) % groups,
        cotangent=normal(samples, length, out_features).to(dtype),
    )
