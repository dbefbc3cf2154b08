"""Calls that between them reach every kernel, every variant of it and every shape that changes its tiles.

Machine code depends on a size only by the tiles chosen for it and by whether it is 1 or a multiple of 16, so that few
sizes stand for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from static_record import Call

from ept_kernels import PyramidGeometry
from ept_kernels.triton import backend
from ept_kernels.triton.fold_backward import fold_backward
from ept_kernels.triton.fold_forward import fold_forward
from ept_kernels.triton.fold_layout import layout_for
from ept_kernels.triton.target import is_amd

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

DEFAULT = (2, 4, 6, 8)
PYRAMIDS = {
    "default r=8": (8, DEFAULT),
    "default r=1": (1, DEFAULT),
    "default r=4": (4, DEFAULT),
    "default r=16": (16, DEFAULT),
    "default r=64": (64, DEFAULT),
    "all 2": (8, (2,)),
    "all 8": (8, (8,)),
    "primes": (8, (2, 3, 5, 7)),
    "2 to 16": (8, tuple(range(2, 17))),
}
LAYERS = {"4096x4096": (4096, 4096), "1001x777": (1001, 777)}


@dataclass(frozen=True)
class Case:
    """A pyramid, a layer, a batch: ``segments`` runs of rows with a group each, or None for one group."""

    pyramid: str
    layer: str
    rows: int
    segments: int | None = None
    parameters: str = "fp32"  # or "rows": the dtype of the rows
    strided: bool = False  # x and dy are transposed views
    dropout: float = 0.0
    active: bool = True  # the scales that each group uses are given, as a layer gives them

    @property
    def name(self) -> str:
        routing = "one group" if self.segments is None else f"{self.segments} segments"
        extras = [f"parameters as {self.parameters}"] * (self.parameters != "fp32") + ["strided"] * self.strided
        extras += [f"dropout {self.dropout}"] * (self.dropout > 0) + ["nothing said of scales"] * (not self.active)
        return ", ".join([self.pyramid, self.layer, f"T={self.rows}", routing, *extras])

    @property
    def wide(self) -> bool:
        return not self.strided and all(size % 16 == 0 for size in LAYERS[self.layer])


CASES = (
    *(Case("default r=8", "4096x4096", rows) for rows in (8192, 1000, 64, 16, 1)),
    *(Case("default r=8", "4096x4096", 8192, segments) for segments in (8, 8192)),
    *(Case("default r=8", "4096x4096", rows, rows) for rows in (64, 16)),
    *(Case("default r=8", "4096x4096", 8192, segments, active=False) for segments in (None, 8, 8192)),
    *(Case("2 to 16", "4096x4096", 8192, segments, active=False) for segments in (None, 8192)),
    Case("default r=8", "4096x4096", 8192, parameters="rows"),
    Case("default r=8", "4096x4096", 8192, strided=True),
    *(Case("default r=8", "4096x4096", 8192, segments, dropout=0.1) for segments in (None, 8192)),
    Case("default r=8", "4096x4096", 16, dropout=0.1),
    *(Case(pyramid, "4096x4096", 8192, dropout=0.1) for pyramid in ("default r=16", "all 8", "2 to 16")),
    *(Case("default r=8", "1001x777", rows, segments) for rows in (8192, 16, 1) for segments in (None, rows)),
    *(
        Case(pyramid, "4096x4096", rows, segments)
        for pyramid in list(PYRAMIDS)[1:]
        for rows, segments in ((8192, None), (8192, 8192), (16, None))
    ),
)


def calls(case: Case, dtype: str) -> dict[Call, Callable[[], object]]:
    """The op calls of ``case``: forward in both forms of the base, and backward for what training may ask for."""
    rank, scales = PYRAMIDS[case.pyramid]
    inside, outside = LAYERS[case.layer]
    of_rows = DTYPES[dtype]
    of_parameters = of_rows if case.parameters == "rows" else torch.float32

    def tensor(*shape: int, dtype: torch.dtype = of_rows) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def batch(features: int) -> torch.Tensor:
        return tensor(features, case.rows).T if case.strided else tensor(case.rows, features)

    x, dy, weight, bias = batch(inside), batch(outside), tensor(outside, inside), tensor(outside)
    A = tensor(rank, -(-inside // min(scales)), dtype=of_parameters)
    B = tensor(-(-outside // min(scales)), rank, dtype=of_parameters)
    folded = tensor(3, sum(k * k for k in scales), dtype=of_parameters)
    groups = None if case.segments is None else tensor(case.segments, dtype=torch.int64)
    shared = (A, B, folded, groups)
    active = tensor(3, len(scales), dtype=torch.bool) if case.active else None
    options = (case.dropout, tensor(1, dtype=torch.int64) if case.dropout else None, active)

    def linear(*, base: str, bias: torch.Tensor | None, needs: tuple[bool, ...]) -> None:
        os.environ["EPT_TRITON_BASE"] = base
        try:
            backend.pyramid_linear(x, weight, bias, *shared, scales, *options)
            backend.pyramid_linear_backward(dy, x, weight, *shared, scales, needs, *options)
        finally:
            del os.environ["EPT_TRITON_BASE"]

    def delta(needs: tuple[bool, ...]) -> None:
        backend.pyramid_delta(x, *shared, outside, scales, *options)
        backend.pyramid_delta_backward(dy, x, *shared, scales, needs, *options)

    def update() -> None:
        backend.pyramid_weight(A, B, folded, inside, outside, scales)
        backend.pyramid_weight_backward(
            tensor(3, outside, inside, dtype=of_parameters), A, B, folded, scales, (True, True, True)
        )

    def fold(top_k: int, tasks: torch.Tensor | None, copies: int = 2) -> None:
        """Route and fold as an eager layer does, with ``copies`` experts of each scale; 64 are the most."""
        geometry, width = PyramidGeometry(inside, outside, rank, scales * copies), 768 if case.wide else 50
        layout = layout_for(geometry, 1.0, x.device)
        gate, table, packed = tensor(len(scales) * copies, width), tensor(9, width), tensor(len(layout.expert))
        routed = (gate, table, tasks, 0)
        for keep in (False, True):
            folded, _, *kept = fold_forward(*routed, 3, packed, layout, len(scales), top_k, keep)
        for needs in ((True, True, True), (False, False, True)):
            fold_backward(folded, *routed, packed, *kept, layout, needs)

    def folds() -> None:
        for tasks in (None, tensor(3, dtype=torch.int64)):
            fold(2, tasks)
        fold(1, None, copies=1)
        fold(2, None, copies=64 // len(scales))

    def single_launch() -> None:
        if not is_amd():  # refused there
            linear(base="single", bias=bias, needs=everything)

    everything, rows_only, parameters_only = (True,) * 4, (True, False, False, False), (False, True, True, True)
    work = {
        "linear": lambda: linear(base="fused", bias=bias, needs=everything),
        "linear in a single launch": single_launch,
        "delta": lambda: delta(everything),
    }
    if case.pyramid == "default r=8":
        work |= {
            "linear without bias, gradient of x": lambda: linear(base="fused", bias=None, needs=rows_only),
            "linear apart from its base": lambda: linear(base="split", bias=bias, needs=everything),
            "gradient of A": lambda: delta((False, True, False, False)),
            "gradient of B": lambda: delta((False, False, True, False)),
            "gradient of the kernels": lambda: delta((False, False, False, True)),
            "gradients of parameters": lambda: delta(parameters_only),
        }
    if case.segments is None:
        work["weight"] = update
        if dtype == "fp32":  # parameters are, whatever the rows
            work["route and fold"] = folds
    return {Call(f"{name}; {case.name}", case.wide, case.pyramid): start for name, start in work.items()}
