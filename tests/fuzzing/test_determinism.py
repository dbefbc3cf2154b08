"""``ept-train --deterministic``: the same seed gives the same bits, in another process and by any number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ept


def _train(folder: Path, threads: int, *options: str) -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(Path(ept.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-m", "training_run", str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


slow = pytest.mark.skipif(
    os.environ.get("EPT_SLOW_TESTS") != "1", reason="two training runs each; EPT_SLOW_TESTS=1 or make fuzz runs it"
)


@slow
@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_give_the_same_bits(threads: int, tmp_path: Path) -> None:
    first, second = (_train(tmp_path / name, threads, "--deterministic") for name in ("first", "second"))
    assert first == second
    assert "loss" in first["losses"]


@slow
def test_another_seed_gives_others(tmp_path: Path) -> None:
    one, two = (_train(tmp_path / seed, 1, "--deterministic", "--seed", seed) for seed in ("1", "2"))
    assert one["adapter"] != two["adapter"]
