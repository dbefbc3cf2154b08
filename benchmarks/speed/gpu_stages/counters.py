"""Hardware counters of the three largest kernels of each way: tensor pipes, DRAM, what warps wait for.

ncu runs this module as a program, which marks one forward and backward of each way; ``OUT/counters.ncu-rep`` keeps all
that was counted. Clocks are not locked, so that times can be compared with the other stages'.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess

import torch
from harness import forced_backend

from .bench import Bench, program
from .tensors import build, ways

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
LARGEST = 3
#: Parts of metric names -> columns: everything else stays in the report.
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def workload(dry: bool) -> None:
    """One marked forward and backward of each way, after one that compiles."""
    device = torch.device("cpu" if dry else "cuda")
    sizes = (64, 64, 8, 4) if dry else (4096, 4096, 8, 1024)
    layer = build(device, torch.bfloat16, *sizes, groups=8)
    for way in ways(device, torch.bfloat16):
        if way == "torch" and not dry:  # many small kernels, none of them ours
            continue
        with forced_backend(way):
            for marked in (False, True):
                if marked and not dry:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                layer.evaluate(layer.forward, layer.leaves())
                if marked and not dry:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()


def run(bench: Bench) -> None:
    if bench.dry:
        workload(dry=True)
        _report(bench, SAMPLE)
        return
    ncu = shutil.which("ncu")
    if ncu is None:
        bench.emit(what="counters", error="ncu was not found on the path")
        return
    report = bench.out / "counters.ncu-rep"
    options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all", "-f"]
    options += [part for section in SECTIONS for part in ("--section", section)]
    marked = program("from gpu_stages.counters import workload; workload(dry=False)")
    profile = [ncu, *options, "-o", str(report.with_suffix("")), *marked]
    done = subprocess.run(profile, capture_output=True, text=True, timeout=max(1.0, bench.left - 6))
    if done.returncode or not report.exists():
        bench.emit(what="counters", error=(done.stdout + done.stderr)[-500:])
        return
    read = [ncu, "--import", str(report), "--page", "raw", "--csv"]
    _report(bench, subprocess.run(read, capture_output=True, text=True, timeout=60).stdout)


def _report(bench: Bench, text: str) -> None:
    """Rows of the largest kernels in what ``ncu --page raw --csv`` prints: names, units, then a line a kernel."""
    start = text.find('"ID"')
    if start < 0:
        bench.emit(what="counters", error=f"ncu printed no table: {text[-300:]}")
        return
    names, units, *lines = csv.reader(io.StringIO(text[start:]))
    kernels: dict[str, list[dict[str, object]]] = {}
    for line in lines:
        values = dict(zip(names, line, strict=True))
        row: dict[str, object] = {"kernel": values.get("Kernel Name", "")[:90]}
        for name, unit in zip(names, units, strict=True):
            number = _number(values[name])
            if number is None:
                continue
            if name in METRICS:
                factor = MICROSECONDS.get(unit) if METRICS[name] == "us" else 1.0
                row[METRICS[name]] = None if factor is None else number * factor
            elif "tensor" in name and name.endswith("pct_of_peak_sustained_active"):
                row["tensor_percent"] = max(number, float(str(row.get("tensor_percent", 0.0))))
            elif "dram__bytes" in name or ("issue_stalled" in name and name.endswith("ratio")):
                row[name] = number
        kernels.setdefault(str(row["kernel"]), []).append(row)
    largest = sorted(kernels.values(), key=lambda rows: -max(_microseconds(row) for row in rows))
    ours = [rows for rows in largest if not _vendor(str(rows[0]["kernel"]))][:LARGEST]
    theirs = [rows for rows in largest if _vendor(str(rows[0]["kernel"]))][:1]
    for rows in [*ours, *theirs]:
        bench.emit(what="counters", launches=len(rows), **max(rows, key=_microseconds))


def _vendor(kernel: str) -> bool:
    """A product of the vendor's library."""
    return any(part in kernel for part in ("cutlass", "gemm", "cublas", "nvjet"))


def _microseconds(row: dict[str, object]) -> float:
    return float(str(row.get("us") or 0.0))


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


#: What ncu prints, in small: a dry run reads it.
SAMPLE = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","dram__bytes_read.sum"
"","","ns","%","Mbyte"
"0","core_kernel","1,500","40.5","12.5"
"1","sm90_xmma_gemm_bf16","380,000","35.0","130.0"
"2","core_kernel","2,500","41.5","12.5"
"""
