"""Data loaders with worker processes, forked and spawned: the batches of one without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizer

from ept.data import load_tasks
from ept.trainers import TaskBalancedSampler
from ept.training.collator import make_collator, training_rows

from .training_run import _WORDS, make_data


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_no_batch(method: str, tmp_path: Path) -> None:
    if method == "fork" and sys.platform != "linux":
        pytest.skip("this platform does not fork")
    tasks = load_tasks(str(make_data(tmp_path / "data")))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]))
    specs = {index: task.spec for index, task in enumerate(tasks)}
    collator = make_collator("encoder", BertTokenizer(str(vocabulary)), specs, max_length=12)
    rows = training_rows(tasks, list(specs))

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        sampler = TaskBalancedSampler(rows.sizes, 4, seed=3)
        context = method if workers else None
        loader = DataLoader(
            rows, 4, sampler=sampler, collate_fn=collator, num_workers=workers, multiprocessing_context=context
        )
        return list(loader)

    alone, together = batches(0), batches(2)
    assert len(alone) == len(together) > 3
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
