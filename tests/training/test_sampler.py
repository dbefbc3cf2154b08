"""The order in which tasks and rows are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler

from ept.training import TaskBalancedSampler

SIZES = (5, 400, 37)
STARTS = np.array([0, 5, 405, 442])


def _tasks(order: np.ndarray) -> np.ndarray:
    return np.searchsorted(STARTS, order, side="right") - 1


@pytest.mark.parametrize("task_batching", ["mixed", "single"])
def test_every_task_gets_the_same_share(task_batching: str) -> None:
    sampler = TaskBalancedSampler(SIZES, 4, seed=3, task_batching=task_batching)
    tasks = []
    for epoch in range(60):
        sampler.set_epoch(epoch)
        tasks.append(_tasks(sampler.order()))
    draws = len(np.concatenate(tasks)) // (4 if task_batching == "single" else 1)
    shares = np.bincount(np.concatenate(tasks), minlength=3) / sum(map(len, tasks))
    assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / draws)  # four standard deviations


def test_single_batches_hold_one_task_and_mixed_ones_several() -> None:
    kinds = {
        name: [
            len(set(_tasks(np.array(batch))))
            for batch in BatchSampler(TaskBalancedSampler(SIZES, 8, task_batching=name), 8, drop_last=False)
        ]
        for name in ("single", "mixed")
    }
    assert set(kinds["single"]) == {1}
    assert np.mean(kinds["mixed"]) > 2


def test_all_processes_draw_one_task_for_a_step_of_single_task_batches() -> None:
    order = _tasks(TaskBalancedSampler(SIZES, 4, world_size=3, task_batching="single").order())
    assert {len(set(step)) for step in order.reshape(-1, 12)} == {1}


def test_rows_of_a_task_come_without_replacement() -> None:
    order = TaskBalancedSampler(SIZES, 2, seed=1).order()
    for task, size in enumerate(SIZES):
        drawn = order[_tasks(order) == task] - STARTS[task]
        for start in range(0, len(drawn), size):
            part = drawn[start : start + size]
            assert len(set(part)) == len(part)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TaskBalancedSampler(SIZES, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 1), (4, 3), (500, 2)])
def test_an_epoch_is_all_rows_rounded_up_to_full_global_batches(batch_size: int, world_size: int) -> None:
    sampler = TaskBalancedSampler(SIZES, batch_size, world_size=world_size)
    assert len(sampler) == len(list(sampler))
    assert len(sampler) % (batch_size * world_size) == 0
    assert sum(SIZES) <= len(sampler) < sum(SIZES) + batch_size * world_size


def test_ranks_share_one_order_without_overlap() -> None:
    whole = list(BatchSampler(TaskBalancedSampler(SIZES, 4, world_size=2, seed=5), 4, drop_last=False))
    shards = [
        list(
            BatchSamplerShard(
                BatchSampler(TaskBalancedSampler(SIZES, 4, world_size=2, seed=5), 4, drop_last=False), 2, rank
            )
        )
        for rank in range(2)
    ]
    assert shards[0] == whole[0::2]
    assert shards[1] == whole[1::2]


def test_skipping_batches_lands_where_the_run_stopped() -> None:
    batches = BatchSampler(TaskBalancedSampler(SIZES, 4, seed=5), 4, drop_last=False)
    assert list(SkipBatchSampler(batches, skip_batches=7)) == list(batches)[7:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": []}, "sizes"),
        ({"sizes": [3, 0]}, "sizes"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"task_batching": "both"}, "task_batching is 'both'; allowed: mixed, single"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskBalancedSampler(**{"sizes": SIZES, "batch_size": 4, **options})
