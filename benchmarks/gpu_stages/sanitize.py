"""compute-sanitizer on a small layer, forward and gradients, of every backend with kernels of its own.

Without torch's cache of memory, so that a read beside a tensor is a read outside an allocation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from .bench import Bench
from .tensors import ways

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROGRAM = """
import sys, torch
from ept_kernels import doctor
right, words = doctor.check(sys.argv[1], torch.device(sys.argv[2]), torch.float32)
print(words)
sys.exit(0 if right else 3)
"""
FOUND = 9  # the exit status of compute-sanitizer where it found something


def run(bench: Bench) -> None:
    command = shutil.which("compute-sanitizer")
    if command is None and not bench.dry:
        bench.emit(what="sanitize", error="compute-sanitizer was not found on the path")
        return
    served = {way.split(":")[0] for way in ways(bench.device, torch.float32)}
    backends = ["torch"] if bench.dry else sorted(served - {"torch"})
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS[:1] if bench.dry else TOOLS:
        for backend in backends:
            if bench.left < 8 and not bench.dry:
                bench.emit(what="sanitize", tool=tool, way=backend, skipped="no time left")
                continue
            prefix = [] if bench.dry else [str(command), "--tool", tool, "--error-exitcode", str(FOUND)]
            arguments = [*prefix, sys.executable, "-c", PROGRAM, backend, str(bench.device)]
            try:
                done = subprocess.run(
                    arguments, env=environment, capture_output=True, text=True, timeout=max(bench.left, 8)
                )
            except subprocess.TimeoutExpired:
                bench.emit(what="sanitize", tool=tool, way=backend, skipped="took longer than was left")
                continue
            row = {"what": "sanitize", "tool": tool, "way": backend, "right": done.returncode == 0}
            text = (done.stdout + done.stderr)[-1500:]
            bench.emit(**row, **({"said": text[-300:]} if done.returncode == 0 else {"error": text}))
