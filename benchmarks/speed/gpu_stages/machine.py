"""Versions and properties, what serves here, and the ceilings: copy, read, cuBLAS, a launch."""

from __future__ import annotations

import shutil
import subprocess

import torch
from harness import Timed

from ept_kernels import doctor

from .bench import Bench
from .tensors import DTYPES, ways


def run(bench: Bench) -> None:
    text = [*doctor.machine(), *doctor.versions(), *doctor.backends()]
    bench.emit(what="doctor", lines=text)
    bench.emit(what="serves", **{name: ways(bench.device, dtype) for name, dtype in DTYPES.items()})
    if bench.device.type == "cuda":
        about = torch.cuda.get_device_properties(bench.device)
        names = [name for name in dir(about) if not name.startswith("_")]
        values = {name: getattr(about, name) for name in names}
        bench.emit(what="properties", **{k: v for k, v in values.items() if isinstance(v, (int, float, str))})
    if shutil.which("nvidia-smi"):
        found = subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER"], capture_output=True, text=True, timeout=20)
        bench.emit(what="nvidia-smi", lines=[line.strip() for line in found.stdout.splitlines() if ":" in line])
    _bandwidth(bench)
    for name, dtype in DTYPES.items():
        _products(bench, name, dtype)
    tiny = torch.zeros(8, device=bench.device)
    calls = {"eager": Timed(lambda: tiny.add_(1)), "graph": Timed(bench.graphed(lambda: tiny.add_(1)))}
    bench.compare(calls, key="how", what="one tiny kernel", rounds=100)


def _bandwidth(bench: Bench) -> None:
    count = 1 << (16 if bench.dry else 28)
    source, target = (torch.ones(count, device=bench.device) for _ in range(2))
    calls = {"copy": Timed(lambda: target.copy_(source)), "read": Timed(source.sum)}
    medians = bench.compare(calls, key="what", bytes=4 * count, rounds=10)
    for name, microseconds in medians.items():
        moved = 4 * count * (2 if name == "copy" else 1)
        bench.emit(what=f"{name} bandwidth", TB_per_s=moved / microseconds / 1e6)


def _products(bench: Bench, name: str, dtype: torch.dtype) -> None:
    """fp32 products are exact here: TF32 is off, as torch has it."""
    for sizes in ((8192, 8192, 8192), (8192, 4096, 4096)):
        m, k, n = bench.size(*sizes)
        a, b = (torch.randn(rows, k, device=bench.device).to(dtype) for rows in (m, n))
        calls = {"product": Timed(lambda a=a, b=b: a @ b.T)}
        found = bench.compare(calls, key="what", rounds=5 if name == "fp32" else 12, m=m, k=k, n=n, dtype=name)
        bench.emit(what="cuBLAS", m=m, k=k, n=n, dtype=name, TFLOP_per_s=2 * m * k * n / found["product"] / 1e6)
