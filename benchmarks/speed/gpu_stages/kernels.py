"""Each product of the design and each small kernel alone, in graphs of a few calls on tensors of their own.

U = x Ahat^T, V = core(U), y = x W0^T + V Bhat; dV = dy Bhat^T, (V, dU, dfolded) = core_backward(U, dV),
dx = dy W0 + dU Ahat, dAhat = dU^T x, dBhat = V^T dy, (dA, dB) = gather(dAhat, dBhat)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Timed
from torch import Tensor

from .bench import Bench
from .tensors import RANK, Layer, build, providers

POINTS = (
    (4096, 4096, 8192),
    (4096, 4096, 16),
    (4096, 4096, 2048),
    (4096, 4096, 512),
    (4096, 11008, 8192),
    (768, 768, 8192),
)
SAMPLES = 8


def run(bench: Bench) -> None:
    for width, height, tokens in POINTS[:1] if bench.dry else POINTS:
        width, height = bench.size(width, height)
        tokens = SAMPLES if bench.dry else tokens
        labels = {"in": width, "out": height, "tokens": tokens}
        if bench.left < 5:
            bench.emit(what="kernel", **labels, skipped="no time left")
            continue
        with bench.attempt(what="kernel", **labels):
            copies = [
                _Tensors.of(build(bench.device, bench.half, width, height, SAMPLES, tokens // SAMPLES, SAMPLES, seed))
                for seed in range(bench.copies)
            ]
            calls = {}
            for name, call in {**_products(bench, copies), **_small_kernels(bench, copies)}.items():
                with bench.attempt(what="kernel", call=name, **labels):
                    calls[name] = Timed(bench.rotated(call))
            bench.compare(calls, key="call", rotated=True, seconds=3.0, baseline="y = x W^T", **labels)


@dataclass(frozen=True)
class _Tensors:
    """A layer's rows and factors, and its intermediates, all in the dtype of the rows."""

    layer: Layer
    x: Tensor
    dy: Tensor
    A_hat: Tensor
    B_hat: Tensor
    U: Tensor
    y: Tensor

    @classmethod
    def of(cls, layer: Layer) -> _Tensors:
        g, x = layer.geometry, layer.x.flatten(0, 1)
        torch_kernels = providers(x.device, x.dtype)["torch"]
        A_hat, B_hat = torch_kernels.interleave(layer.A, layer.B, g.in_features, g.out_features, g.scales, x.dtype)
        dy = layer.cotangent.flatten(0, 1)
        return cls(layer, x, dy, A_hat, B_hat, x @ A_hat.T, torch.empty_like(dy))


def _products(bench: Bench, copies: list[_Tensors]) -> dict[str, Callable[[int], object]]:
    """V and dU stand in for each other's size: U is taken for both."""

    def on(call: Callable[[_Tensors], object]) -> Callable[[int], object]:
        return lambda copy: call(copies[copy])

    found: dict[str, Callable[[_Tensors], object]] = {
        "y = x W^T": lambda t: torch.mm(t.x, t.layer.weight.T, out=t.y),
        "U = x Ahat^T": lambda t: t.x @ t.A_hat.T,
        "V Bhat": lambda t: torch.mm(t.U, t.B_hat, out=t.y),
        "y = x W^T, y += V Bhat": lambda t: F.linear(t.x, t.layer.weight).addmm_(t.U, t.B_hat),
        "y = V Bhat, y += x W^T": lambda t: torch.mm(t.U, t.B_hat, out=t.y).addmm_(t.x, t.layer.weight.T),
        "dV = dy Bhat^T": lambda t: t.dy @ t.B_hat.T,
        "dx = dy W": lambda t: t.dy @ t.layer.weight,
        "dx = dy W, dx += dU Ahat": lambda t: (t.dy @ t.layer.weight).addmm_(t.U, t.A_hat),
        "dAhat = dU^T x": lambda t: t.U.T @ t.x,
        "dBhat = V^T dy": lambda t: t.U.T @ t.dy,
    }
    if bench.device.type == "cuda":  # not rounded to half before the sums over scales
        found["dAhat = dU^T x, fp32"] = lambda t: torch.mm(t.U.T, t.x, out_dtype=torch.float32)
        found["dBhat = V^T dy, fp32"] = lambda t: torch.mm(t.U.T, t.dy, out_dtype=torch.float32)
    if "triton" in providers(bench.device, copies[0].x.dtype):
        from ept_kernels.triton.fused import fused

        found["y = [x | V] [W | Bhat]^T"] = lambda t: fused(t.x, t.layer.weight, None, t.U, t.B_hat)
        found["dx = [dy | dU] [W^T | Ahat]^T"] = lambda t: fused(t.dy, t.layer.weight.T, None, t.U, t.A_hat)
    return {name: on(call) for name, call in found.items()}


def _small_kernels(bench: Bench, copies: list[_Tensors]) -> dict[str, Callable[[int], object]]:
    found: dict[str, Callable[[int], object]] = {}
    g, dtype = copies[0].layer.geometry, copies[0].x.dtype
    hats = [(t.A_hat.float(), t.B_hat.float()) for t in copies]
    for name, kernels in providers(bench.device, dtype).items():

        def interleave(copy: int, kernels=kernels) -> object:
            layer = copies[copy].layer
            return kernels.interleave(layer.A, layer.B, g.in_features, g.out_features, g.scales, dtype)

        def core(copy: int, kernels=kernels) -> object:
            layer = copies[copy].layer
            return kernels.core(copies[copy].U, layer.folded, layer.groups, None, g.scales)

        def core_backward(copy: int, kernels=kernels) -> object:
            layer, U = copies[copy].layer, copies[copy].U
            return kernels.core_backward(U, U, layer.folded, layer.groups, None, g.scales, (True, True, True))

        def gather(copy: int, kernels=kernels) -> object:
            return kernels.gather(*hats[copy], RANK, g.seed_width, g.seed_height, g.scales)

        for call in (interleave, core, core_backward, gather):
            found[f"{call.__name__} ({name})"] = call
    return found
