"""The CUDA library, built by nvcc for this GPU into the checkout, and loaded. No torch headers are needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ept_kernels.backends import cuda as cuda_backend

from .bench import Bench

ROOT = Path(__file__).resolve().parents[3]


def run(bench: Bench) -> None:
    """A dry run calls the same command and builds nothing, since that takes minutes of one core."""
    environment = {**os.environ, "EPT_BUILD_CPU": "0", "EPT_BUILD_CUDA": "0" if bench.dry else "1"}
    if not bench.dry:
        major, minor = torch.cuda.get_device_capability(bench.device)
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    row = {"what": "build", "command": " ".join(command[1:]), "build_s": time.monotonic() - start}
    if done.returncode:
        bench.emit(**row, error=(done.stdout + done.stderr)[-500:])
        return
    if bench.dry:
        bench.emit(**row, said=done.stdout[-300:])
        return
    with bench.attempt(**row):
        bench.emit(**row, **cuda_backend.build_info())
