"""Checkpoints and steps that are not finite in a distributed run: the processes decide alike and write one folder."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from faults.runs import Conditions, make_context, start
from safetensors.torch import load_file

from ept.training import newest_checkpoint


def run_two(arguments: Sequence[str], folder: Path, poisoned_rank: int | None = None) -> tuple[list[int], list[str]]:
    """``ept-train`` on two processes, as torchrun starts them: exit codes and what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    context, processes, logs = make_context(), [], []
    for rank in range(2):
        logs.append(folder / f"log{rank}")
        logs[-1].unlink(missing_ok=True)
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        conditions = Conditions(environment=environment, poisoned_rank=poisoned_rank)
        processes.append(start(context, arguments, logs[-1], conditions))
    for process in processes:
        process.join()
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def test_two_processes_stop_alike_and_resume_to_the_bit(command: Callable, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_steps": 1, "eval_limit": 2, "batch_size": 4}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    codes, shown = run_two(command(whole, **options), tmp_path)
    assert codes == [0, 0], shown
    checkpoint = newest_checkpoint(whole / "checkpoints")
    assert checkpoint.name == "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint-3", "checkpoint-4"]

    codes, shown = run_two(command(stopped, **options), tmp_path, poisoned_rank=1)
    assert codes == [1, 1], shown
    reasons = [[line for line in text.splitlines() if line.startswith("ept-train: error: ")] for text in shown]
    assert len(reasons[0]) == 1, shown
    assert reasons[0] == reasons[1]
    assert "step 3: the loss is not finite; first such value: the output of encoder." in reasons[0][0]
    assert newest_checkpoint(stopped / "checkpoints").name == "checkpoint-2"
    codes, shown = run_two(command(stopped, "--resume", **options), tmp_path)
    assert codes == [0, 0], shown
    wanted, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    shutil.rmtree(stopped)
    codes, shown = run_two(command(stopped, nan_policy="skip", **options), tmp_path, poisoned_rank=0)
    assert codes == [0, 0], shown
    assert "the step is left out" in shown[0]
