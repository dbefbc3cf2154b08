"""Checks of a backend's small kernels (``library.SmallKernels``) alone, against plain torch in float64.

The same checks run in Triton's interpreter, on modules with an error planted, and on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyramid_testing import assert_matches, assert_same_bits, poisoned_memory, skewed_groups
from torch import Tensor

from ept_kernels.backends import torch as torch_backend
from ept_kernels.triton.launch import Config

# --- layouts and comparison -------------------------------------------------------------------------------------------


def _turned(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor [m, n]`` in another memory layout."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "strided":
        return torch.stack([tensor, -tensor], dim=2)[..., 0]
    if layout == "sliced":
        return torch.nn.functional.pad(tensor, (2, 3))[:, 2 : 2 + tensor.shape[1]]
    return tensor


# --- interleaved factors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """A and B of a layer; the tensors are the same on every run."""

    in_features: int
    out_features: int
    rank: int
    scales: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.rank)
        shapes = (
            (self.rank, -(-self.in_features // self.scales[0])),
            (-(-self.out_features // self.scales[0]), self.rank),
        )
        return tuple(_turned(torch.randn(s, generator=generator), self.layout).to(device) for s in shapes)


FACTORS = {
    "the paper's scales": Factors(29, 26, 3, (2, 4, 6, 8)),
    "no width divides": Factors(37, 11, 2, (3, 5, 7)),
    "scale 1, rank 1": Factors(5, 3, 1, (1,)),
    "one by one": Factors(1, 1, 1, (1,)),
    "all scales to 16": Factors(41, 35, 1, tuple(range(1, 17))),
    "more slots than a block": Factors(25, 21, 2, (9, 20)),
    "a scale of the whole layer": Factors(13, 13, 2, (13,)),
    "rank 7": Factors(9, 7, 7, (2, 3)),
    "a block of channels and one": Factors(513, 6, 1, (2, 6)),
    "a block of outputs and one": Factors(6, 513, 1, (2, 5)),
    "transposed": Factors(15, 22, 3, (2, 3), "transposed"),
    "strided": Factors(15, 22, 3, (2, 3), "strided"),
    "half": Factors(15, 22, 3, (2, 3), dtype=torch.float16),
}


def check_interleave(kernels: Any, case: Factors, device: str = "cpu") -> None:
    """Bit for bit: nothing is computed but a rounding."""
    sizes = (case.in_features, case.out_features, case.scales, case.dtype)
    A, B = case.tensors(device)
    with poisoned_memory():
        actual = kernels.interleave(A, B, *sizes)
    for hat, expected in zip(actual, torch_backend.interleave(A.cpu(), B.cpu(), *sizes), strict=True):
        assert hat.is_contiguous()
        assert_same_bits(hat.cpu(), expected, "an interleaved factor")


def check_gather(kernels: Any, case: Factors, device: str = "cpu") -> None:
    """The gradients of A and B, of either alone, and of none."""
    A, B = case.tensors("cpu")
    generator = torch.Generator().manual_seed(1)
    columns = case.rank * sum(case.scales)
    hats = [torch.randn(columns, n, generator=generator).to(case.dtype) for n in (case.in_features, case.out_features)]
    sizes = (case.rank, A.shape[1], B.shape[0], case.scales)
    expected = torch_backend.gather(*(hat.double() for hat in hats), *sizes)
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        given = [hat.to(device) if want else None for hat, want in zip(hats, wanted, strict=True)]
        with poisoned_memory():
            actual = kernels.gather(*given, *sizes)
        for want, gradient, exact in zip(wanted, actual, expected, strict=True):
            assert (gradient is not None) == want
            if want:
                assert gradient.dtype == torch.float32
                assert_matches(gradient.cpu(), exact, 1e-6)


# --- the core ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """Rows, their groups and the groups' kernels.

    Attributes:
        runs: how many equal runs of rows have a group each; None: no groups.
        active: whether some scales of some groups are inactive; U and dV hold NaN there.
        strange: whether the first and the last run have groups that do not exist.
    """

    rows: int = 7
    rank: int = 2
    scales: tuple[int, ...] = (2, 3)
    runs: int | None = None
    num_groups: int = 1
    skew: str = "uniform"
    active: bool = False
    strange: bool = False
    dtype: torch.dtype = torch.float32
    groups_dtype: torch.dtype = torch.int64


CORES = {
    "no groups": Core(),
    "no rows": Core(rows=0),
    "no rows, no runs": Core(rows=0, runs=0, num_groups=2),
    "groups, and none is asked for": Core(num_groups=3),
    "one row": Core(rows=1, runs=1, num_groups=5),
    "a block of items and one": Core(rows=129, rank=1, runs=129, num_groups=3),
    "runs": Core(rows=15, runs=5, num_groups=3),
    "runs longer than a block": Core(rows=134, rank=1, runs=2, num_groups=3),
    "one id a row": Core(rows=19, runs=19, num_groups=4),
    "int32 groups": Core(rows=19, runs=19, num_groups=4, groups_dtype=torch.int32),
    "scale 1": Core(scales=(1,)),
    "many scales": Core(rows=4, rank=1, scales=tuple(range(1, 17, 3)), runs=2, num_groups=2),
    "more slots than a block": Core(rows=5, scales=(9, 20), runs=5, num_groups=2),
    "many ranks": Core(rows=9, rank=17, runs=3, num_groups=2),
    "no group": Core(runs=7, num_groups=0, strange=True),
    "inactive": Core(rows=9, scales=(2, 3, 5), active=True),
    "inactive, runs": Core(rows=20, scales=(2, 3, 9), runs=4, num_groups=5, active=True),
    "inactive, one id a row": Core(rows=33, scales=(2, 3, 5), runs=33, num_groups=5, active=True, skew="zipf"),
    "strange groups": Core(rows=13, runs=13, num_groups=3, strange=True),
    "strange runs": Core(rows=12, runs=4, num_groups=3, strange=True, groups_dtype=torch.int32),
    "strange and inactive": Core(rows=21, scales=(2, 3, 9), runs=7, num_groups=4, strange=True, active=True),
    "fp16": Core(rows=21, runs=7, num_groups=2, dtype=torch.float16),
    "bf16": Core(rows=21, runs=7, num_groups=2, dtype=torch.bfloat16, active=True),
    **{f"{skew} groups": Core(rows=41, runs=41, num_groups=6, skew=skew) for skew in ("identical", "huge runs")},
}

#: Sums over their rows take several spans, where a span is short.
SPANS = {
    "one id a row": Core(rows=77, rank=1, runs=77, num_groups=3),
    "runs": Core(rows=63, rank=2, runs=9, num_groups=2, active=True),
    "slots": Core(rows=35, rank=1, scales=(9,), runs=5, num_groups=2),
    "strange": Core(rows=40, rank=1, runs=8, num_groups=2, strange=True),
    "no groups": Core(rows=33, rank=3),
}


class CoreTensors:
    """The tensors of a ``Core``, and what comes of them by the definition in float64."""

    def __init__(self, case: Core) -> None:
        generator = torch.Generator().manual_seed(case.rows)
        self.case, width = case, case.rank * sum(case.scales)
        self.U, self.dV = (torch.randn(case.rows, width, generator=generator).to(case.dtype) for _ in range(2))
        self.folded = torch.randn(case.num_groups, sum(k * k for k in case.scales), generator=generator)
        self.groups = self.active = None
        if case.runs is not None:
            count = max(case.num_groups, 1)
            self.groups = skewed_groups(case.skew, case.runs, count, generator).to(case.groups_dtype)
            if case.strange:
                self.groups[0], self.groups[-1] = case.num_groups, -1
        if case.active:
            self.active = torch.rand(case.num_groups, len(case.scales), generator=generator) < 0.5
            entries = self.active.repeat_interleave(torch.tensor([k * k for k in case.scales]), 1)
            self.folded = self.folded.masked_fill(~entries, 0)
            for rows in (self.U, self.dV):
                rows.masked_fill_(~self._used(), float("nan"))

    def _exists(self) -> Tensor:
        """Which rows have a group, ``[T, 1]``."""
        if self.groups is None:
            return torch.ones(self.case.rows, 1, dtype=torch.bool)
        known = (self.groups >= 0) & (self.groups < self.case.num_groups)
        return known.repeat_interleave(self.case.rows // max(len(known), 1))[:, None]

    def _used(self) -> Tensor:
        """Which entries of U have an active kernel, ``[T, W]``."""
        exists = self._exists().expand(self.U.shape)
        if self.active is None:
            return exists
        columns = torch.tensor([self.case.rank * k for k in self.case.scales])
        return exists & self.active[self._rows_groups()].repeat_interleave(columns, 1)

    def _rows_groups(self) -> Tensor:
        if self.groups is None:
            return torch.zeros(self.case.rows, dtype=torch.int64)
        groups = self.groups.long().clamp(0, max(self.case.num_groups - 1, 0))
        return groups.repeat_interleave(self.case.rows // max(len(groups), 1))

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """V, dU and the gradient of the kernels."""
        case, exists = self.case, self._exists()
        U, dV = (rows.double().masked_fill(~self._used(), 0) for rows in (self.U, self.dV))
        folded = self.folded.double() if case.num_groups else torch.zeros(1, self.folded.shape[1], dtype=torch.float64)
        groups = self._rows_groups() if self.groups is not None else None
        V, dU, grad = torch_backend.core_backward(U, dV, folded, groups, self.active, case.scales, (True, True, True))
        V, dU = (rows.masked_fill(~exists, float("nan")) for rows in (V, dU))
        return V, dU, grad[: case.num_groups]

    def arguments(self, device: str) -> tuple:
        tensors = (self.folded, self.groups, self.active)
        return *(None if tensor is None else tensor.to(device) for tensor in tensors), self.case.scales


def assert_equal_with_nan(actual: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN elsewhere"
    assert_matches(actual.nan_to_num(), exact.nan_to_num(), tolerance, what)


def check_core(kernels: Any, case: Core, device: str = "cpu") -> None:
    """V, dU and the kernels' gradient, by forward and by backward, from memory that holds NaN."""
    tensors = CoreTensors(case)
    U, dV, arguments = tensors.U.to(device), tensors.dV.to(device), tensors.arguments(device)
    with poisoned_memory():
        forward = kernels.core(U, *arguments)
        V, dU, grad_folded = kernels.core_backward(U, dV, *arguments, (True, True, True))
    rounding = 1e-6 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps
    for actual, exact, what in zip((V, dU), tensors.expected(), ("V", "dU"), strict=False):
        assert actual.dtype == case.dtype
        assert_equal_with_nan(actual.cpu(), exact, rounding, what)
    assert_same_bits(forward.cpu(), V.cpu(), "V")
    assert grad_folded.dtype == torch.float32
    assert_matches(grad_folded.cpu(), tensors.expected()[2], 1e-6, "the kernels' gradient")


def check_needs(kernels: Any, case: Core, needs: tuple[bool, bool, bool], device: str = "cpu") -> None:
    """What is not asked for is None, and may lack what it would be made of."""
    tensors, (need_V, need_dU, need_folded) = CoreTensors(case), needs
    U = tensors.U.to(device) if need_V or need_folded else None
    dV = tensors.dV.to(device) if need_dU or need_folded else None
    with poisoned_memory():
        results = kernels.core_backward(U, dV, *tensors.arguments(device), needs)
    for actual, exact, need, what in zip(results, tensors.expected(), needs, ("V", "dU", "dKbar"), strict=True):
        assert (actual is not None) == need, what
        if need:
            assert_equal_with_nan(actual.cpu(), exact, 1e-6, what)


# --- dropout ----------------------------------------------------------------------------------------------------------


def _philox(seed: int, c0: np.ndarray, c1: np.ndarray) -> np.ndarray:
    """First word of Philox4x32-10 (Salmon et al. 2011) for counters ``(c0, c1, 0, 0)``."""
    counters = [c0.astype(np.uint64), c1.astype(np.uint64), np.zeros_like(c0, np.uint64), np.zeros_like(c0, np.uint64)]
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = counters[0] * np.uint64(0xD2511F53), counters[2] * np.uint64(0xCD9E8D57)
        counters = [
            (second >> shift) ^ counters[1] ^ keys[0],
            second & low,
            (first >> shift) ^ counters[3] ^ keys[1],
            first & low,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return counters[0]


def expected_mask(seed: int, rows: int, features: int, p: float) -> Tensor:
    """``[rows, features]``, 1 / (1 - p) where an entry is kept and 0 where it is dropped."""
    row, column = np.meshgrid(np.arange(rows), np.arange(features), indexing="ij")
    word = _philox(seed, column, row).astype(np.uint32).view(np.int32).astype(np.int64)
    uniform = np.where(word < 0, -word - 1, word) * 4.6566127342e-10
    return torch.from_numpy(uniform >= p).double() / (1 - p)


@dataclass(frozen=True)
class Dropout:
    """Rows of some layout, and whether they are added to others."""

    rows: int
    features: int
    layout: str = "contiguous"
    onto: bool = False
    dtype: torch.dtype = torch.float32
    p: float = 0.3
    seed: int = 0x123456789ABCDEF


DROPOUTS = {
    "rows": Dropout(5, 19),
    "no rows": Dropout(0, 4),
    "a block and a channel": Dropout(2, 1025),
    "transposed": Dropout(6, 11, "transposed"),
    "strided": Dropout(6, 11, "strided", onto=True),
    "sliced, fp16": Dropout(6, 11, "sliced", dtype=torch.float16),
    "onto fp16": Dropout(4, 33, onto=True, dtype=torch.float16),
    "onto bf16": Dropout(4, 33, onto=True, dtype=torch.bfloat16),
    "nothing dropped": Dropout(3, 9, p=0.0),
}


def check_dropout(kernels: Any, case: Dropout, device: str = "cpu") -> None:
    """The mask is Philox of an entry's row and column, on every device."""
    generator = torch.Generator().manual_seed(0)
    x, onto = (torch.randn(case.rows, case.features, generator=generator).to(case.dtype) for _ in range(2))
    exact = x.double() * expected_mask(case.seed, case.rows, case.features, case.p)
    seed = torch.tensor([case.seed], device=device)
    rows, base = _turned(x, case.layout).to(device), onto.to(device).clone() if case.onto else None
    with poisoned_memory():
        actual = kernels.dropout(rows, seed, case.p, onto=base)
    assert actual.dtype == case.dtype
    # Computed in fp32 and rounded once: no entry is further off than half a unit in its last place.
    expected = exact + onto.double() if case.onto else exact
    tolerance = 1e-6 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps / 2 * 1.01
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=1e-6)


# --- the fused product ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """``x weight^T + bias + V hat`` of one half dtype."""

    rows: int
    inner: int
    features: int
    width: int
    bias: bool = True
    layout: str = "contiguous"  # of x
    weight_layout: str = "contiguous"
    dtype: torch.dtype = torch.float16


FUSED = {
    "two bands of rows": Fused(16 * 9 + 3, 23, 37, 5),
    "many columns": Fused(3, 16, 100, 33, bias=False),
    "blocks fit": Fused(32, 32, 48, 16),
    "one by one": Fused(1, 1, 1, 1),
    "transposed rows": Fused(18, 20, 9, 6, layout="transposed"),
    "sliced rows": Fused(18, 20, 9, 6, layout="sliced"),
    "transposed weight": Fused(9, 20, 17, 6, weight_layout="transposed"),
    "strided weight": Fused(9, 20, 17, 6, weight_layout="strided"),
    "bf16": Fused(9, 20, 17, 6, dtype=torch.bfloat16),
}
#: One that a few rows and features fill several of.
SMALL_TILE = Config.of(BLOCK_T=16, BLOCK_O=16, BLOCK_I=16)


def check_fused(kernels: Any, case: Fused, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(case.rows)
    shapes = (case.rows, case.inner), (case.features, case.inner), (case.rows, case.width), (case.width, case.features)
    x, weight, V, hat = (torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes)
    bias = torch.randn(case.features, generator=generator).to(case.dtype) if case.bias else None
    exact = x.double() @ weight.double().T + V.double() @ hat.double() + (0 if bias is None else bias.double())
    turned = _turned(x, case.layout), _turned(weight, case.weight_layout)
    rows, weight, V, hat, bias = (None if t is None else t.to(device) for t in (*turned, V, hat, bias))
    with poisoned_memory():
        actual = kernels.fused(rows, weight, bias, V, hat)
    assert actual.dtype == case.dtype
    assert_matches(actual.cpu(), exact, torch.finfo(case.dtype).eps)
