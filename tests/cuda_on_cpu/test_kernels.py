"""The CUDA kernels, executed on a CPU behind the real functions of their backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_on_cpu import checks
from cuda_on_cpu.checks import ALL, Check, CoreCase
from fold_testing import LargeFoldCase, folds_by
from hypothesis import given
from hypothesis import strategies as st
from pyramid_testing import HOST_READS, Recorder, assert_same_bits, examples

from ept_kernels.backends import cuda as cuda_backend
from ept_kernels.backends import cuda_fold

pytestmark = pytest.mark.usefixtures("cuda")
fold_tasks = folds_by(cuda_fold)


@pytest.mark.parametrize("check", ALL.values(), ids=ALL)
def test_against_float64(check: Check) -> None:
    check()


@given(
    rows=st.integers(0, 90),
    rank=st.integers(1, 12),
    scales=st.sets(st.integers(1, 12), min_size=1, max_size=4).map(sorted),
    grouping=st.sampled_from(checks.GROUPINGS),
    dtype=st.sampled_from((torch.float32, *checks.HALF)),
    inactive=st.booleans(),
    groups=st.integers(1, 9),
)
@examples(40)
def test_random_cores(rows, rank, scales, grouping, dtype, inactive, groups) -> None:
    if rows == 0 and grouping != "none":
        grouping = "rows"
    CoreCase(rows, rank, scales, grouping, dtype, inactive=inactive, groups=groups).check()


@given(
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    rank=st.integers(1, 5),
    scales=st.sets(st.integers(1, 12), min_size=1, max_size=4).map(sorted),
    dtype=st.sampled_from((torch.float32, *checks.HALF)),
)
@examples(30)
def test_random_factors(in_features, out_features, rank, scales, dtype) -> None:
    sizes = (in_features, out_features)
    checks.check_interleave(sizes, rank, scales, torch.float32, dtype, strided=False)
    checks.check_gather(sizes, rank, scales, (dtype, dtype))


def test_philox_is_philox() -> None:
    """The vectors that its authors publish for 4 x 32 bits and ten rounds."""
    counters = np.array([[0] * 4, [2**32 - 1] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    keys = [(0, 0), (2**32 - 1,) * 2, (0xA4093822, 0x299F31D0)]
    words = [
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ]
    for counter, key, expected in zip(counters, keys, words, strict=True):
        assert " ".join(f"{word:08x}" for word in checks.philox(counter[None], key)[0]) == expected


def test_a_mask_is_replayed_and_belongs_to_its_seed() -> None:
    x, seed = torch.ones(40, 64), torch.tensor([123])
    first = cuda_backend.dropout(x, seed, 0.25)
    assert_same_bits(cuda_backend.dropout(x, seed, 0.25), first)
    assert_same_bits(cuda_backend.dropout(x[:7, :33], seed, 0.25), first[:7, :33], "of an entry, not of a shape")
    assert not torch.equal(cuda_backend.dropout(x, seed + 1, 0.25), first)
    assert not torch.equal(cuda_backend.dropout(x, seed + 2**32, 0.25), first)
    assert 0.7 < first.count_nonzero() / x.numel() < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the threads of a block run in another order."""
    case, fold = CoreCase(333, 3, (2, 3, 8), "rows", dtype), LargeFoldCase(3)
    results = []
    for reverse in "01":
        monkeypatch.setenv("EPT_SHIM_REVERSED", reverse)
        results.append({**dict(enumerate(case.backward())), **fold.results(fold_tasks)})
    for name, value in results[0].items():
        assert_same_bits(results[1][name], value, name)


def test_a_task_does_not_depend_on_the_others() -> None:
    case = LargeFoldCase(3)
    with torch.no_grad():
        together, _ = case.fold(fold_tasks)
        case.tasks = case.tasks[2:3]
        assert_same_bits(case.fold(fold_tasks)[0], together[2:3])


def test_nothing_is_read_back_to_the_host_and_no_input_is_written() -> None:
    case, fold = CoreCase(60, 3, (2, 5), "rows", inactive=True), LargeFoldCase(2)
    inputs = (case.U, case.dV, case.folded, case.ids, case.active, *fold.parameters, fold.tasks)
    before = [tensor.clone() for tensor in inputs]
    x, seed = torch.ones(5, 9), torch.tensor([3])
    with Recorder() as recorder:
        case.backward()
        cuda_backend.dropout(x, seed, 0.5)
        fold.results(fold_tasks)
    assert not set(recorder.names()) & set(HOST_READS)
    for tensor, copy in zip(inputs, before, strict=True):
        assert_same_bits(tensor, copy)


def test_a_task_that_the_table_lacks_is_refused_where_it_is_known() -> None:
    case = LargeFoldCase(2)
    case.tasks = 3
    with pytest.raises(IndexError, match="task_ids holds 3; allowed: 0 to 2"):
        case.fold(fold_tasks)


def test_another_dtype_for_the_gradient_is_refused() -> None:
    case = CoreCase(4, 1, (2,), "none")
    case.dV = case.dV.half()
    with pytest.raises(ValueError, match=r"dV must have the dtype of U, torch\.float32, got torch\.float16"):
        case.backward()
