"""The copies that say whether a kept fold still holds, and ``fold_kept`` against ``fold_tasks`` on random layers."""

from __future__ import annotations

import pytest
import torch
from fold_testing import SCALING, FoldCase
from pyramid_testing import assert_same_bits, poisoned_memory
from torch import Tensor

from ept_kernels import Kept, fold_kept, fold_tasks
from ept_kernels.backends import cpu as cpu_backend
from ept_kernels.backends import cpu_library

missing = cpu_backend.unsupported(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"no native CPU backend: {missing}")


def kept_fold(kept: Kept, case: FoldCase, tasks: int | Tensor | None) -> tuple[Tensor, Tensor]:
    """``(folded, active)`` of each of ``tasks``, by way of ``groups``."""
    gate, table, *kernels = case.parameters
    folded, groups, active = fold_kept(kept, Kept(), gate, table, tasks, kernels, case.top_k, SCALING, case.geometry)
    return (folded, active) if groups is None else (folded[groups], active[groups])


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_fold_tasks_gives_before_and_after_any_change(seed: int) -> None:
    case, kept = FoldCase(seed), Kept()
    with torch.no_grad(), poisoned_memory():
        for change in range(len(case.parameters) + 1):
            for _ in range(2):
                found, expected = kept_fold(kept, case, case.tasks), case.fold(fold_tasks)
                for value, exact in zip(found, expected, strict=True):
                    assert_same_bits(value, exact)
            if change < len(case.parameters):
                flat = case.parameters[change].view(-1)
                flat[torch.randint(len(flat), ())] = torch.randn(())


def test_one_bit_is_a_change() -> None:
    case, kept = FoldCase(3), Kept()
    with torch.no_grad():
        for parameter in case.parameters:
            kept_fold(kept, case, None)
            before = kept.value
            kept_fold(kept, case, None)
            assert kept.value is before
            parameter.view(-1)[-1].view(torch.int32).bitwise_xor_(1)
            kept_fold(kept, case, None)
            assert kept.value is not before


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("tasks", [-1, 100, torch.tensor([0, 100]), torch.tensor([-1])])
def test_a_task_that_the_table_lacks_is_refused(tasks: int | Tensor, warm: bool) -> None:
    case, kept = FoldCase(8), Kept()
    gate, table, *kernels = case.parameters
    case.parameters = (gate, torch.randn(6, table.shape[1]), *kernels)
    with torch.no_grad():
        if warm:
            kept_fold(kept, case, None)
        with pytest.raises(IndexError, match=r"task_ids holds (-1|100); allowed: 0 to 5"):
            kept_fold(kept, case, tasks)


def test_it_keeps_nothing_with_gradients() -> None:
    case, kept = FoldCase(3), Kept()
    gate, table, *kernels = case.parameters
    assert fold_kept(kept, Kept(), gate, table, 0, kernels, case.top_k, SCALING, case.geometry) is None
    assert kept.value is None


def test_a_snapshot_names_what_does_not_fit() -> None:
    array = torch.arange(6.0)
    snapshot = cpu_library.module().Snapshot([(array.data_ptr(), 24)])
    assert snapshot.equals([array.data_ptr()])
    with pytest.raises(ValueError, match="arrays must number 1, got 2"):
        snapshot.equals([array.data_ptr()] * 2)
    rows = torch.tensor([0, 2])
    assert snapshot.rows_equal(array.data_ptr(), 8, rows.data_ptr(), 2, 0)
    array[2] = -1  # in row 1
    assert snapshot.rows_equal(array.data_ptr(), 8, rows.data_ptr(), 2, 0)
    assert not snapshot.rows_equal(array.data_ptr(), 8, 0, 0, 1)
    with pytest.raises(IndexError, match="task_ids holds 3; allowed: 0 to 2"):
        snapshot.rows_equal(array.data_ptr(), 8, 0, 0, 3)
