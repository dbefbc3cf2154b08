"""Each function of backend ``cuda`` against plain expressions in float64: what every build of the kernels has to pass.

A check makes its tensors, calls the backend from poisoned memory and compares. ``test_kernels.py`` runs all of them in
this process, the sanitizers and the planted mutants run ``SAMPLE`` in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from fold_testing import (
    FoldCase,
    LargeFoldCase,
    SaturatedFoldCase,
    assert_matches_definition,
    assert_nan_shows,
    assert_only_what_is_asked_for,
    assert_ties_go_to_the_first,
    folds_by,
)
from pyramid_testing import assert_matches, assert_same_bits, poisoned_memory
from torch import Tensor

from ept_kernels.backends import cuda as cuda_backend
from ept_kernels.backends import cuda_fold

fold_tasks = folds_by(cuda_fold)

Check = Callable[[], None]
HALF = (torch.bfloat16, torch.float16)
NAN = float("nan")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    """Relative error of a result that is summed in fp32 and rounded once."""
    return 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps


# --- interleave and gather --------------------------------------------------------------------------------------------


def interleaved(factor: Tensor, features: int, scales: Sequence[int]) -> Tensor:
    """``[r, w]`` -> ``[r * sum(k), features]``, copies of the factor's numbers on diagonals."""
    column = torch.arange(features)
    rows = [
        torch.where(column % k == q, factor[p, column // k], 0)
        for k in scales
        for p in range(len(factor))
        for q in range(k)
    ]
    return torch.stack(rows)


def check_interleave(
    sizes: tuple[int, int], rank: int, scales: Sequence[int], factor: torch.dtype, dtype: torch.dtype, strided: bool
) -> None:
    width, height = (-(-size // scales[0]) for size in sizes)
    A, B = random(rank, width, dtype=factor), random(height, rank, seed=1, dtype=factor)
    if strided:
        A, B = A.T.contiguous().T, B.T.contiguous().T
    with poisoned_memory():
        A_hat, B_hat = cuda_backend.interleave(A, B, *sizes, scales, dtype)
    assert A_hat.is_contiguous()
    assert B_hat.is_contiguous()
    assert B_hat.data_ptr() % 16 == A_hat.data_ptr() % 16 == 0
    assert_same_bits(A_hat, interleaved(A, sizes[0], scales).to(dtype), "A_hat")
    assert_same_bits(B_hat, interleaved(B.T, sizes[1], scales).to(dtype), "B_hat")


def check_gather(
    sizes: tuple[int, int], rank: int, scales: Sequence[int], dtypes: tuple[torch.dtype | None, torch.dtype | None]
) -> None:
    columns, seeds = rank * sum(scales), [-(-size // scales[0]) for size in sizes]
    grads = [
        None if dtype is None else random(columns, size, seed=i, dtype=dtype)
        for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
    ]
    with poisoned_memory():
        results = cuda_backend.gather(*grads, rank, *seeds, scales)
    for i, (grad, result) in enumerate(zip(grads, results, strict=True)):
        if grad is None:
            assert result is None
            continue
        factor = torch.zeros(rank, seeds[i], dtype=torch.float64, requires_grad=True)
        (exact,) = torch.autograd.grad(interleaved(factor, sizes[i], scales), factor, grad.double())
        assert result.dtype == torch.float32
        assert_matches(result, exact.T if i else exact, 1e-6, "AB"[i])


# --- core -------------------------------------------------------------------------------------------------------------

GROUPINGS = ("none", "one", "segments", "rows", "own", "unknown")


def ids_of(grouping: str, rows: int, count: int) -> Tensor | None:
    """Groups of ``rows`` rows among ``count``: None, one for all, for each of several runs, for each row, ..."""
    if grouping == "none":
        return None
    if grouping == "own":  # a group for every row
        return torch.randperm(rows, generator=torch.Generator().manual_seed(5))
    entries = {"one": 1, "segments": max(d for d in range(1, 8) if rows % d == 0)}.get(grouping, rows)
    ids = torch.randint(count, (entries,), generator=torch.Generator().manual_seed(6))
    if grouping == "unknown":
        ids[::3] = torch.tensor([-1, count, 2**33, -(2**33)])[torch.arange(len(ids[::3])) % 4]
    return ids


class CoreCase:
    """U and dV of some rows, the folded kernels of some groups, and which of these use which scale."""

    def __init__(
        self,
        rows: int,
        rank: int,
        scales: Sequence[int],
        grouping: str = "segments",
        dtype: torch.dtype = torch.float32,
        *,
        inactive: bool = False,
        narrow: bool = False,
        groups: int = 3,
    ) -> None:
        self.rank, self.scales = rank, scales
        count = rows if grouping == "own" else groups
        columns, folded = rank * sum(scales), sum(k * k for k in scales)
        self.U, self.dV = random(rows, columns, seed=1, dtype=dtype), random(rows, columns, seed=2, dtype=dtype)
        self.folded, self.ids = random(count, folded, seed=3), ids_of(grouping, rows, count)
        if narrow and self.ids is not None:
            self.ids = self.ids.int()
        self.active = None
        group = torch.zeros(rows, dtype=torch.int64)
        if self.ids is not None and rows:
            group = self.ids.long().repeat_interleave(rows // len(self.ids))
        self.known = (group >= 0) & (group < count)
        self.group = group.where(self.known, 0)
        if inactive:
            self.active = torch.rand(count, len(scales), generator=torch.Generator().manual_seed(4)) < 0.6
            self.active[0, 0] = False
            blocks = [self.active[:, s, None].expand(-1, k * k) for s, k in enumerate(scales)]
            self.folded = self.folded * torch.cat(blocks, dim=1)
            skipped = ~self.active[self.group]
            hidden = torch.cat([skipped[:, s, None].expand(-1, rank * k) for s, k in enumerate(scales)], dim=1)
            for rows_of in (self.U, self.dV):  # what a group does not use is not read
                rows_of[hidden] = NAN

    def _blocks(self, tensor: Tensor) -> list[Tensor]:
        """``[T, W]`` -> of each scale ``[T, r, k]`` in float64, zero where it is not used."""
        parts = tensor.double().split([self.rank * k for k in self.scales], dim=1)
        blocks = [part.reshape(len(tensor), self.rank, k) for part, k in zip(parts, self.scales, strict=True)]
        if self.active is None:
            return blocks
        used = self.active[self.group]
        return [torch.where(used[:, s, None, None], block, 0) for s, block in enumerate(blocks)]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """V, dU and the gradient of the folded kernels; NaN rows where the group does not exist."""
        V, dU, grad = [], [], []
        offset = 0
        owner = (self.group[:, None] == torch.arange(len(self.folded))).double() * self.known[:, None]
        for u, dv, k in zip(self._blocks(self.U), self._blocks(self.dV), self.scales, strict=True):
            kernel = self.folded.double()[self.group, offset : offset + k * k].view(-1, k, k)
            V.append(torch.einsum("taq,tpq->tpa", kernel, u).flatten(1))
            dU.append(torch.einsum("taq,tpa->tpq", kernel, dv).flatten(1))
            by_row = torch.einsum("tpa,tpq->taq", dv, u).flatten(1)
            grad.append(owner.T @ by_row)
            offset += k * k
        rows = [torch.cat(parts, dim=1).where(self.known[:, None], NAN) for parts in (V, dU)]
        return rows[0], rows[1], torch.cat(grad, dim=1)

    def backward(self, needs: tuple[bool, bool, bool] = (True, True, True)) -> tuple[Tensor | None, ...]:
        with poisoned_memory():
            return cuda_backend.core_backward(self.U, self.dV, self.folded, self.ids, self.active, self.scales, needs)

    def check(self) -> None:
        V, dU, grad = self.exact()
        with poisoned_memory():
            forward = cuda_backend.core(self.U, self.folded, self.ids, self.active, self.scales)
        again, actual_dU, actual_grad = self.backward()
        assert_same_bits(again, forward, "V again")
        for what, actual, exact in (("V", forward, V), ("dU", actual_dU, dU)):
            assert actual.dtype == self.U.dtype, what
            assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN for a row without a group, nowhere else"
            assert_matches(actual.nan_to_num(), exact.nan_to_num(), rounding(self.U.dtype), what)
        assert actual_grad.dtype == torch.float32
        assert_matches(actual_grad, grad, 1e-5, "grad_folded")
        if self.active is not None:
            off = torch.cat([~self.active[:, s, None].expand(-1, k * k) for s, k in enumerate(self.scales)], dim=1)
            assert not actual_grad[off].any(), "the gradient of an inactive scale is zero"


def check_core(*arguments, **options) -> None:
    CoreCase(*arguments, **options).check()


def check_one_span() -> None:
    """More rows than a block takes at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backend, "_spans", lambda rows, groups: (1, rows))
        CoreCase(300, 1, (2, 3), "rows", inactive=True).check()


def check_needs() -> None:
    """Each result alone is what it is among the others."""
    case = CoreCase(70, 3, (2, 5), "rows", inactive=True)
    everything = case.backward()
    for i in range(3):
        alone = case.backward(tuple(j == i for j in range(3)))
        for j, result in enumerate(alone):
            if i == j:
                assert_same_bits(result, everything[j])
            else:
                assert result is None
    dV, case.dV = case.dV, None
    assert_same_bits(case.backward((True, False, False))[0], everything[0], "V from U alone")
    case.U, case.dV = None, dV
    assert_same_bits(case.backward((False, True, False))[1], everything[1], "dU from dV alone")


def check_strides() -> None:
    """Views of what a caller has: the same results as contiguous ones."""
    case = CoreCase(24, 2, (2, 3), "rows", inactive=True)
    expected = case.backward()
    for name in ("U", "dV", "folded", "active"):
        setattr(case, name, getattr(case, name).T.contiguous().T)
    case.ids = case.ids.repeat_interleave(2)[::2]
    for result, exact in zip(case.backward(), expected, strict=True):
        assert_same_bits(result, exact)


# --- dropout ----------------------------------------------------------------------------------------------------------


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters ``[n, 4]``, by the definition: a round multiplies, swaps and mixes in the key."""
    words = [column.astype(np.uint64) for column in counter.T]
    low = np.uint64(0xFFFFFFFF)
    for i in range(10):
        a, b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        k0, k1 = (np.uint64((k + i * step) % 2**32) for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        words = [(b >> np.uint64(32)) ^ words[1] ^ k0, b & low, (a >> np.uint64(32)) ^ words[3] ^ k1, a & low]
    return np.stack(words, axis=1)


def kept(rows: int, columns: int, seed: int, p: float) -> Tensor:
    row, quad = np.meshgrid(np.arange(rows), np.arange(-(-columns // 4)), indexing="ij")
    counter = np.stack([quad.ravel(), row.ravel(), np.zeros(row.size, int), np.zeros(row.size, int)], axis=1)
    words = philox(counter, (seed % 2**32, seed >> 32)).reshape(rows, -(-columns // 4) * 4)[:, :columns]
    return torch.from_numpy(words.astype(np.int64)) >= int(p * 2**32)


def check_dropout(
    rows: int, columns: int, dtype: torch.dtype, *, onto: bool = False, padding: int = 0, p: float = 0.3
) -> None:
    seed = torch.tensor([(7 << 32) + 12345 + rows])
    x = random(rows, columns + padding, dtype=dtype)[:, :columns]
    base = random(rows, columns, seed=1, dtype=dtype) if onto else None
    exact = torch.where(kept(rows, columns, seed.item(), p), x.double() / (1 - p), 0)
    if onto:
        exact = exact + base.double()
    with poisoned_memory():
        result = cuda_backend.dropout(x, seed, p, base)
    assert result.dtype == dtype
    assert (result is base) == onto
    assert_matches(result, exact, rounding(dtype))


# --- router and fold --------------------------------------------------------------------------------------------------


def check_fold(make: Callable[[], FoldCase]) -> None:
    case = make()
    assert_matches_definition(case, fold_tasks)
    for wanted in range(min(3, len(case.parameters))):
        assert_only_what_is_asked_for(case, fold_tasks, wanted)


def check_unknown_tasks() -> None:
    """NaN in what a task selects, which others do not see; the gradient of the kernels of the others is theirs."""
    case = FoldCase(3, 1)
    case.tasks = torch.tensor([0, -1, 0, len(case.parameters[1]), 2**40])
    with poisoned_memory(), torch.no_grad():
        folded, active = case.fold(fold_tasks)
    assert folded[[1, 3, 4]].isnan().any(1).all()
    assert torch.equal(folded[[1, 3, 4]].isnan().any(1), active[[1, 3, 4]].any(1))
    case.tasks = 0
    assert_same_bits(folded[2:3], case.fold(fold_tasks)[0].detach())


def check_fold_corners() -> None:
    assert_ties_go_to_the_first(fold_tasks)
    for top_k in (1, 3):
        assert_nan_shows(FoldCase(7, top_k), fold_tasks)
    check_unknown_tasks()


# --- all of them ------------------------------------------------------------------------------------------------------

_ODD = (2, 3, 5, 8)  # with and without code of their own
_MANY = tuple(range(1, 34))  # more than a struct holds
#: Small and through every kernel.
SAMPLE: dict[str, Check] = {
    "interleave": partial(check_interleave, (70, 45), 3, _ODD, torch.float32, torch.bfloat16, False),
    "interleave, fp32": partial(check_interleave, (45, 70), 2, (4, 6), torch.float32, torch.float32, True),
    "interleave, vectors": partial(check_interleave, (64, 4128), 2, (1, 8), torch.float16, torch.float16, False),
    "gather": partial(check_gather, (70, 45), 3, _ODD, (torch.float32, torch.bfloat16)),
    "gather, one": partial(check_gather, (45, 300), 2, (4, 6), (None, torch.float32)),
    "core": partial(check_core, 42, 3, _ODD, "segments", inactive=True),
    "core, half": partial(check_core, 70, 9, (1, 4, 6, 35), "rows", torch.bfloat16),
    "core, unknown groups": partial(check_core, 131, 2, (2, 6), "unknown", torch.float16, narrow=True),
    "core, spans": partial(check_core, 333, 1, (2, 12), "none"),
    "core, one span": check_one_span,
    "core, no rows": partial(check_core, 0, 2, (2, 3), "segments"),
    "dropout": partial(check_dropout, 5, 67, torch.float32),
    "dropout, added": partial(check_dropout, 3, 520, torch.bfloat16, onto=True),
    "fold": partial(check_fold, lambda: FoldCase(3, 2)),
    "fold, one expert": partial(check_fold, lambda: FoldCase(5, 1)),
    "fold, corners": check_fold_corners,
}


def _more() -> dict[str, Check]:
    found: dict[str, Check] = {}
    for dtype in (torch.float32, *HALF):
        kind = str(dtype).removeprefix("torch.")
        for grouping in GROUPINGS:
            for inactive in (False, True):
                what = f"core, {grouping}, {kind}{', inactive' * inactive}"
                found[what] = partial(check_core, 120, 3, _ODD, grouping, dtype, inactive=inactive)
        for padding in (0, 3, 4):
            for onto in (False, True):
                what = f"dropout, {kind}, padding {padding}{', added' * onto}"
                found[what] = partial(check_dropout, 9, 132, dtype, onto=onto, padding=padding)
        for factor in (torch.float32, *HALF):
            what = f"interleave, {str(factor).removeprefix('torch.')} to {kind}"
            found[what] = partial(check_interleave, (101, 83), 5, (2, 7, 11), factor, dtype, False)
        found[f"gather, {kind}"] = partial(check_gather, (101, 83), 5, (2, 7, 11), (dtype, dtype))
    found |= {
        "core, one rank and scale": partial(check_core, 67, 1, (1,), "rows"),
        "core, more ranks than threads": partial(check_core, 5, 131, (2, 3), "rows"),
        "core, scales wider than a warp": partial(check_core, 18, 2, (33, 70), "segments"),
        "core, more scales than a struct holds": partial(check_core, 18, 2, _MANY, "rows", inactive=True),
        "core, every scale to 16": partial(check_core, 50, 2, tuple(range(1, 17)), "segments", torch.float16),
        "core, groups of many rows": partial(check_core, 2048, 2, (2, 4), "segments", groups=2),
        "core, many groups": partial(check_core, 512, 1, (2,), "rows", groups=300),
        "core, a group for each of many rows": partial(check_core, 1500, 1, (2, 3), "own", inactive=True),
        "core, no groups": partial(check_core, 0, 2, (2, 3), "own"),
        "core, int32 ids": partial(check_core, 60, 2, (2, 3), "segments", narrow=True),
        "core, only what is needed": check_needs,
        "core, strides": check_strides,
        "dropout, no rows": partial(check_dropout, 0, 12, torch.float32),
        "dropout, all kept": partial(check_dropout, 3, 20, torch.float32, p=0.0),
        "dropout, next to none kept": partial(check_dropout, 3, 20, torch.float32, p=0.99),
        "interleave, more scales than a struct holds": partial(
            check_interleave, (80, 70), 1, _MANY, torch.float32, torch.float32, False
        ),
        "gather, more scales than a struct holds": partial(check_gather, (80, 70), 1, _MANY, (torch.float32,) * 2),
        "gather, nothing": partial(check_gather, (8, 9), 1, (2,), (None, None)),
    }
    found |= {f"fold {seed}": partial(check_fold, partial(FoldCase, seed)) for seed in range(20)}
    for top_k in (1, 3, 33):
        found[f"fold, large, top {top_k}"] = partial(check_fold, partial(LargeFoldCase, top_k))
    for top_k in (1, 2):
        found[f"fold, saturated, top {top_k}"] = partial(check_fold, partial(SaturatedFoldCase, top_k))
    return found


ALL = {**SAMPLE, **_more()}
