"""Statistics behind ``task_ids="auto"``: the same on every rank of a distributed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ept.prototypes import TaskPrototypes


def _observe(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    prototypes = TaskPrototypes(3, 4)
    z, tasks = torch.load(f"{folder}/samples.pt")
    for part in range(2):
        prototypes.observe(z[rank::2][part::2], tasks[rank::2][part::2])
    torch.save(prototypes.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no distributed package")
def test_every_rank_has_the_statistics_of_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    z, tasks = torch.randn(22, 4) + 3, torch.randint(3, (22,))
    torch.save((z, tasks), tmp_path / "samples.pt")
    mp.spawn(_observe, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = TaskPrototypes(3, 4)
    whole.observe(z, tasks)
    for name, expected in whole.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, atol=1e-4, rtol=1e-4)
