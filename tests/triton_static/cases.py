"""Calls that between them reach every kernel, every variant of it and every shape that changes its tiles.

Machine code depends on a size only by the tiles chosen for it and by whether it is 1 or a multiple of 16, so that few
sizes stand for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from record import Call

from ept_kernels import PyramidGeometry
from ept_kernels.problem import Routing
from ept_kernels.triton import backend, fold
from ept_kernels.triton.fused import fused

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT = (2, 4, 6, 8)
#: Rank and scales. What holds for few scales may spill for many, or for a rank that is no power of two.
PYRAMIDS = {
    "default": (8, DEFAULT),
    "rank 1": (1, DEFAULT),
    "rank 64": (64, DEFAULT),
    "rank 17": (17, (2, 8)),
    "2 to 16": (8, tuple(range(2, 17))),
}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Product:
    """A call of plan ``fused``: the sides of the weight, rows, and which product of the two passes it is."""

    inside: int
    outside: int
    rows: int = 8192
    backward: bool = False

    @property
    def name(self) -> str:
        return f"{'dy W' if self.backward else 'x W^T'}, {self.outside}x{self.inside}, T={self.rows}"

    def start(self, dtype: torch.dtype) -> None:
        weight = _meta(self.outside, self.inside, dtype=dtype)
        weight, bias = (weight.T, None) if self.backward else (weight, _meta(self.outside, dtype=dtype))
        features, inner = weight.shape
        x, V, hat = (
            _meta(self.rows, inner, dtype=dtype),
            _meta(self.rows, 160, dtype=dtype),
            _meta(160, features, dtype=dtype),
        )
        fused(x, weight, bias, V, hat)


PRODUCTS = tuple(
    Product(*sides, rows, backward)
    for backward in (False, True)
    for *sides, rows in ((4096, 4096, 8192), (4096, 4096, 16), (4096, 11008, 8192), (768, 768, 8192), (777, 1001, 8192))
)


def _small(pyramid: str, dtype: torch.dtype, groups: int | None, active: bool) -> None:
    """The small kernels on 8192 rows of 4096 features, with as many groups' ids as rows, or none."""
    rank, scales = PYRAMIDS[pyramid]
    columns = rank * sum(scales)
    side = -(-4096 // min(scales))
    ids = None if groups is None else _meta(groups, dtype=torch.int64)
    used = _meta(9, len(scales), dtype=torch.bool) if active else None
    folded, rows = _meta(9, sum(k * k for k in scales)), _meta(8192, columns, dtype=dtype)
    backend.interleave(_meta(rank, side), _meta(side, rank), 4096, 4096, scales, dtype)
    backend.core(rows, folded, ids, used, scales)
    backend.core_backward(rows, rows, folded, ids, used, scales, (True, True, True))
    backend.core_backward(rows, rows, folded, ids, used, scales, (False, True, True))
    hat = _meta(columns, 4096)
    for sides in ((hat, hat), (hat, None), (None, hat)):
        backend.gather(*sides, rank, side, side, scales)


def _dropout(columns: int, dtype: torch.dtype) -> None:
    x, seed = _meta(8192, columns, dtype=dtype), _meta(1, dtype=torch.int64)
    backend.dropout(x, seed, 0.1)
    backend.dropout(x, seed, 0.1, onto=x)


def _fold(scales: Sequence[int], width: int, top_k: int, tasks: torch.Tensor | None, copies: int) -> None:
    """Route and fold as an eager layer does, with ``copies`` experts of each scale; 64 are the most."""
    geometry = PyramidGeometry(4096, 4096, 8, tuple(scales) * copies)
    kernels = tuple(_meta(k, k) for k in geometry.kernel_sizes)
    routing = Routing(_meta(len(kernels), width), _meta(9, width), tasks, kernels, top_k, 1.0, geometry)
    for save in (False, True):
        folded, _, saved = fold.fold(routing, save)
    for needs in (True, False):
        fold.fold_backward(routing, folded, saved, (needs, needs, *[True] * len(kernels)))


def calls(dtype: str) -> dict[Call, Callable[[], object]]:
    """What a batch of ``dtype`` starts, the most frequent first."""
    of_rows = DTYPES[dtype]
    work: dict[Call, Callable[[], object]] = {}
    if dtype != "fp32":
        for product in PRODUCTS:
            aligned = product.inside % 16 == 0 and product.outside % 16 == 0
            work[Call(product.name, aligned)] = partial(product.start, of_rows)
    for pyramid in PYRAMIDS:
        work[Call(f"{pyramid}, mixed groups")] = partial(_small, pyramid, of_rows, 8192, True)
    work[Call("default, one group")] = partial(_small, "default", of_rows, None, False)
    for columns in (4096, 777):
        work[Call(f"dropout of {columns}", columns % 16 == 0)] = partial(_dropout, columns, of_rows)
    if dtype == "fp32":  # parameters are, whatever the rows
        for name, scales, width in (("default", DEFAULT, 768), ("2 to 16", PYRAMIDS["2 to 16"][1], 50)):
            for top_k, tasks, copies in (
                (2, _meta(3, dtype=torch.int64), 2),
                (1, None, 1),
                (2, None, 64 // len(scales)),
            ):
                work[Call(f"route and fold, {name}, {copies} of each")] = partial(
                    _fold, scales, width, top_k, tasks, copies
                )
    return work
