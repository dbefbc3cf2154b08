"""``kill -9`` at random moments of ``ept-train``, at least half of them while a checkpoint is written or deleted.

``EPT_KILLS=50`` kills that often (``make faults``); the seed of the moments is ``EPT_KILL_SEED``.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from faults.runs import make_context, start
from safetensors.torch import load_file

from ept.files import read_json
from ept.training.checkpoints import UNFINISHED, newest_checkpoint
from ept.training.run import CHECKPOINT_FOLDER

KILLS = int(os.environ.get("EPT_KILLS", "3"))
STEPS = 14  # of which ten are an epoch
SIGKILLED = -9


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def bits_that_differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def unfinished(checkpoints: Path) -> list[str]:
    try:
        return os.listdir(checkpoints / UNFINISHED)
    except FileNotFoundError:
        return []


def kill_anywhere(process: BaseProcess, checkpoints: Path, moments: random.Random, seconds: float) -> None:
    process.join(moments.uniform(0, seconds))
    process.kill()


def kill_while_saving(process: BaseProcess, checkpoints: Path, moments: random.Random, seconds: float) -> None:
    """Kill at a random moment after one of the next few checkpoints was begun."""
    for _ in range(moments.randint(1, 3)):
        while unfinished(checkpoints) and process.is_alive():
            time.sleep(2e-4)
        while not unfinished(checkpoints) and process.is_alive():
            time.sleep(2e-4)
    time.sleep(moments.uniform(0, 0.03))
    process.kill()


def check_checkpoints(checkpoints: Path) -> Path | None:
    """Every folder of a checkpoint's name is a complete one that loads; the newest."""
    folders = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in folders:
        step = int(folder.name.split("-")[1])
        assert read_json(folder / "trainer_state.json")["global_step"] == step
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "adapter_model.safetensors").values())
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(folder / name, weights_only=True)
        assert (folder / "rng_state.pth").stat().st_size > 0
    newest = newest_checkpoint(checkpoints)
    assert newest == (folders[-1] if folders else None)
    return newest


@pytest.mark.parametrize("method", ["ept", "tucka"])
def test_a_killed_run_goes_on_to_the_adapter_of_an_uninterrupted_one(
    method: str, command: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = random.Random(f"{method}{os.environ.get('EPT_KILL_SEED', '0')}")
    options = {"method": method, "max_steps": STEPS, "batch_size": 32, "eval_limit": 2, "dropout": 0.1}
    if method != "ept":
        options["kernel_sizes"] = None
    context, log = make_context(), tmp_path / "log"
    first, begun = tmp_path / "first", time.monotonic()
    process = start(context, command(first, save_steps=0, **options), log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    seconds, wanted = time.monotonic() - begun, adapter(first)

    kills = KILLS if method == "ept" else max(2, KILLS // 5)
    counts: Counter[str] = Counter()
    while counts["kills"] < kills or 2 * counts["while saving"] < counts["kills"]:
        counts["runs"] += 1
        output = tmp_path / f"run{counts['runs']}"
        checkpoints, newest = output / CHECKPOINT_FOLDER, None
        while True:
            flag = "--resume" if newest else "--overwrite"
            process = start(context, command(output, flag, save_steps=1, **options), log)
            enough = counts["kills"] >= kills and 2 * counts["while saving"] >= counts["kills"]
            if not enough:
                saving = 2 * counts["while saving"] <= counts["kills"]
                (kill_while_saving if saving else kill_anywhere)(process, checkpoints, moments, seconds)
            process.join()
            newest = check_checkpoints(checkpoints)
            if process.exitcode == 0:
                break
            assert not enough and process.exitcode == SIGKILLED, log.read_text()[-3000:]
            counts["kills"] += 1
            counts["while saving"] += bool(unfinished(checkpoints))
            counts["before the first checkpoint"] += newest is None
        assert bits_that_differ(wanted, adapter(output)) == []
        assert read_json(output / "metrics.json")["tasks"] == read_json(first / "metrics.json")["tasks"]
        assert [path.name for path in (newest, *unfinished(checkpoints))] == [f"checkpoint-{STEPS}"]
        assert sorted(os.listdir(output)) == sorted(os.listdir(first))
    with capsys.disabled():
        print(f"\n{method}: {dict(counts)}; every final adapter equal to the bit")
