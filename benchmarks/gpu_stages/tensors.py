"""Random tensors of an adapted layer, and the ways to compute it here; needs neither PEFT nor ``ept``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_kernels import PyramidGeometry, dispatch, pyramid_linear, reference

PAPER = (2, 2, 4, 4, 6, 6, 8, 8)
RANK = 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
#: How the base product and the update of a backend are added; ``EPT_TRITON_BASE`` forces one.
PLANS = {"triton": ("split", "fused")}
PROVIDERS = {
    "torch": "ept_kernels.torch_backend",
    "triton": "ept_kernels.triton",
    "cuda": "ept_kernels.cuda_backend",
}


def ways(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What serves ``dtype`` on ``device``, as ``harness.forced_backend`` takes it: BACKEND or BACKEND:PLAN."""
    names = [name for name in dispatch.available_backends(device, dtype) if name != "reference"]
    return [":".join([name, *plan]) for name in names for plan in _plans(name)]


def providers(device: torch.device, dtype: torch.dtype) -> dict[str, ModuleType]:
    """The modules with the small kernels of each backend that serves ``dtype`` on ``device``."""
    served = dispatch.available_backends(device, dtype)
    return {name: importlib.import_module(module) for name, module in PROVIDERS.items() if name in served}


def _plans(name: str) -> list[list[str]]:
    return [[plan] for plan in PLANS.get(name, ())] or [[]]


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
        """By dense updates, sample by sample."""
        dense = reference.pyramid_weight(A, B, folded, self.geometry).to(x.dtype)
        groups = [0] * len(x) if self.groups is None else self.groups.tolist()
        delta = [rows @ dense[group].T for rows, group in zip(x, groups, strict=True)]
        return F.linear(x, self.weight.to(x.dtype)) + torch.stack(delta)

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
