"""compute-sanitizer on a small layer, forward and gradients, of every backend with kernels of its own.

Without torch's cache of memory, so that a read beside a tensor is a read outside an allocation.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import torch

from ept_kernels import doctor

from .bench import Bench, program
from .tensors import ways

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # the exit status of compute-sanitizer where it found something


def small(backend: str, device: str) -> None:
    """What is watched."""
    right, words = doctor.check(backend, torch.device(device), torch.float32)
    print(words)
    if not right:
        raise RuntimeError(f"{backend} is wrong: {words}")


def run(bench: Bench) -> None:
    """A dry run does what would be watched, and nobody watches."""
    served = {way.split(":")[0] for way in ways(bench.device, torch.float32)} - {"torch"}
    if bench.dry:
        small("torch", str(bench.device))
        bench.emit(what="sanitize", way="torch", right=True)
        return
    command = shutil.which("compute-sanitizer")
    if command is None:
        bench.emit(what="sanitize", error="compute-sanitizer was not found on the path")
        return
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        for backend in sorted(served):
            row = {"what": "sanitize", "tool": tool, "way": backend}
            if bench.left < 8:
                bench.emit(**row, skipped="no time left")
                continue
            watched = program(f"from gpu_stages.sanitize import small; small({backend!r}, {str(bench.device)!r})")
            arguments = [command, "--tool", tool, "--error-exitcode", str(FOUND), *watched]
            try:
                done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=bench.left)
            except subprocess.TimeoutExpired:
                bench.emit(**row, skipped="took longer than was left")
                continue
            text = (done.stdout + done.stderr)[-1500:]
            right = done.returncode == 0
            bench.emit(**row, right=right, error=None if right else text, said=text[-300:])
