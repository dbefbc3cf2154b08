"""Launches of ``scenarios.py`` by torchrun, with gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RUNS = Path(__file__).with_name("scenarios.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def launch(
    processes: int, names: Sequence[str], folder: Path, *, timeout: int = 900
) -> dict[str, list[dict[str, Any]]]:
    """The results of these runs, by name and rank; 1 process is started without torchrun.

    Raises:
        RuntimeError: a process failed, or something waited for ever; what they printed is in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    how = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUNS.parents[2])}
    command = [*how, str(RUNS), str(folder), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no end after {timeout} s: {command}\n{error.stderr}") from error
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {command}\n{done.stdout}\n{done.stderr}")
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(processes)]
        for name in names
    }
