"""``kill -9`` at random moments of ``ept-train``, at least half of them while a checkpoint is written or deleted.

``EPT_KILLS=50`` kills that often (``make faults``); the seed of the moments is ``EPT_KILL_SEED``.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.runs import UNFINISHED, Conditions, make_context, run
from safetensors.torch import load_file

from ept.files import read_json
from ept.training import newest_checkpoint
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


def kill_anywhere(moments: random.Random, seconds: float) -> Conditions:
    return Conditions(killed_after=moments.uniform(0, seconds))


def kill_while_saving(moments: random.Random) -> Conditions:
    """At a file operation of the next three checkpoints (about forty each), or in what no auditor sees after it."""
    return Conditions(killed_at=(moments.randint(1, 120), moments.choice([0, moments.uniform(0, 0.02)])))


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
    context, log, first = make_context(), tmp_path / "log", tmp_path / "first"
    code, shown = run(context, command(first, save_steps=0, **options), log)
    assert code == 0, shown
    seconds, wanted = float(shown.split("processor time: ")[1]), adapter(first)

    kills = KILLS if method == "ept" else max(2, KILLS // 5)
    counts: Counter[str] = Counter()

    def enough() -> bool:  # at least half of them while saving, but for one; a busy machine takes more than ``kills``
        return counts["kills"] >= kills and 2 * counts["while saving"] >= kills - 1

    while not enough():
        assert counts["kills"] < 3 * kills, f"too few kills hit a checkpoint being written: {dict(counts)}"
        counts["runs"] += 1
        output = tmp_path / f"run{counts['runs']}"
        checkpoints, newest = output / CHECKPOINT_FOLDER, None
        while True:
            fate = Conditions()
            if not enough():
                saving = 2 * counts["while saving"] <= counts["kills"]
                fate = kill_while_saving(moments) if saving else kill_anywhere(moments, seconds)
            arguments = command(output, "--resume" if newest else "--overwrite", save_steps=1, **options)
            code, shown = run(context, arguments, log, fate)
            newest = check_checkpoints(checkpoints)
            if code == 0:
                break
            assert code == SIGKILLED, shown
            counts["kills"] += 1
            counts["while saving"] += bool(unfinished(checkpoints))
            counts["before the first checkpoint"] += newest is None
        assert bits_that_differ(wanted, adapter(output)) == []
        assert read_json(output / "metrics.json")["tasks"] == read_json(first / "metrics.json")["tasks"]
        assert [path.name for path in (newest, *unfinished(checkpoints))] == [f"checkpoint-{STEPS}"]
        assert sorted(os.listdir(output)) == sorted(os.listdir(first))
    with capsys.disabled():
        print(f"\n{method}: {dict(counts)}; every final adapter equal to the bit")
