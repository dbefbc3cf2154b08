"""Runs the stand-alone driver on random problems and compares every result with the reference."""

from __future__ import annotations

import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from pyramid_testing import Case, Problem, relative_error
from torch import Tensor

from ept_kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Largest relative error of a result: fp32 everywhere, or rows and tensor-core operands rounded to half.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Call:
    """One case, and how the kernels shall serve it."""

    case: Case
    dtype: torch.dtype = torch.float32
    tensor_cores: bool = False
    accumulate: bool = False
    padding: int = 0  # of a row of x
    wide: bool = True  # int64 groups

    def problem(self) -> Problem:
        return self.case.tensors(self.dtype, adapter_dtype=torch.float32)

    def encode(self) -> bytes:
        """The call as the driver reads it."""
        return _encode(self)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _encode(call: Call) -> bytes:
    problem, geometry = call.problem(), call.case.geometry
    x = problem.x.reshape(-1, geometry.in_features)
    grad = problem.cotangent.reshape(-1, geometry.out_features)
    padded = torch.full((x.shape[0], geometry.in_features + call.padding), float("nan"), dtype=call.dtype)
    padded[:, : geometry.in_features] = x
    padded = padded.flatten()[: max(padded.numel() - call.padding, 0)]
    ids = problem.groups
    header = [
        DTYPES.index(call.dtype),
        call.tensor_cores,
        call.accumulate,
        len(x),
        geometry.in_features,
        geometry.out_features,
        geometry.in_features + call.padding,
        geometry.rank,
        len(geometry.scales),
        *geometry.scales,
        len(problem.folded),
        -1 if ids is None else len(ids),
        call.wide,
    ]
    tensors = [problem.A, problem.B, problem.folded]
    if ids is not None:
        tensors.append(ids.long() if call.wide else ids.int())
    tensors += [padded, grad]
    if call.accumulate:
        tensors += [_bases(call)["y"], _bases(call)["x"]]
    tensors += [problem.weight, problem.weight_cotangent]
    return struct.pack(f"={len(header)}q", *map(int, header)) + b"".join(map(_bytes, tensors))


def _bases(call: Call) -> dict[str, Tensor]:
    """What y and the gradient of x hold before the kernels add to them."""
    generator = torch.Generator().manual_seed(call.case.seed + 1)
    rows, geometry = torch.Size(call.case.lead).numel(), call.case.geometry
    shapes = {"y": (rows, geometry.out_features), "x": (rows, geometry.in_features)}
    return {name: torch.randn(shape, generator=generator).to(call.dtype) for name, shape in shapes.items()}


def _expected(call: Call) -> dict[str, Tensor]:
    """Every result in float64, in the order in which the driver writes them."""
    problem, geometry = call.problem(), call.case.geometry
    delta = problem.evaluate(reference, "pyramid_delta", dtype=torch.float64)
    weight = problem.evaluate(reference, "pyramid_weight", dtype=torch.float64)
    results = {
        "y": delta["output"].reshape(-1, geometry.out_features),
        "x": delta["x"].reshape(-1, geometry.in_features),
        **{name: delta[name] for name in ("A", "B", "folded")},
        "merged": problem.weight.double() + weight["output"],
        "weight": weight["output"],
        **{f"weight's {name}": weight[name] for name in ("A", "B", "folded")},
    }
    if call.accumulate:
        for name, base in _bases(call).items():
            results[name] = results[name] + base.double()
    return results


class Suite:
    """Calls with their exact results, encoded once and run by any number of drivers."""

    def __init__(self, calls: list[Call], folder: Path, name: str) -> None:
        self.calls, self.folder, self.name = calls, folder, name
        self.input = folder / f"{name}.in"
        self.input.write_bytes(struct.pack("=q", len(calls)) + b"".join(call.encode() for call in calls))
        self.expected = [_expected(call) for call in calls]

    def run(self, driver: Path, *, reverse: bool = False) -> str | None:
        """What is wrong with the driver, or None: a crash, a sanitizer's report, a wrong or missing number."""
        target = self.folder / f"{self.name}-{driver.name}-{int(reverse)}.out"
        environment = {
            **os.environ,
            "EPT_SHIM_REVERSED": str(int(reverse)),
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        command = [str(driver), str(self.input), str(target)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode != 0:
            return f"exit status {result.returncode}: {result.stderr[:3000]}"
        data, position = target.read_bytes(), 0
        target.unlink()
        for index, (call, expected) in enumerate(zip(self.calls, self.expected, strict=True)):
            for what, exact in expected.items():
                dtype = call.dtype if what in ("y", "x", "merged") else torch.float32
                size = exact.numel() * dtype.itemsize
                actual = torch.frombuffer(bytearray(data[position : position + size]), dtype=dtype) if size else exact
                position += size
                error = relative_error(actual.reshape(exact.shape), exact)
                exact_fp32 = "weight" in what or (call.dtype != torch.float32 and not call.tensor_cores)
                loose = what in ("y", "x", "merged") or not exact_fp32
                allowed = TOLERANCE[call.dtype] if loose else 1e-5
                if not error <= allowed:
                    return f"call {index} {call}: {what} has the relative error {error:.2e}, allowed {allowed:.0e}"
        return None if position == len(data) else "the driver wrote more than it should"
