"""Faults planted in the kernels, each a replacement of text, and what has to notice it.

``values``: the comparison with the reference. ``address`` and ``thread``: the sanitizers, where the numbers may come
out right: reads beyond an array, barriers that only luck replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cuda_on_cpu.build import SOURCES, Build


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    detector: str
    units: tuple[str, ...] = ()  # what to compile again; default: the file itself

    def plant(self, build: Build, folder: Path) -> Path:
        """The driver with this fault."""
        folder.mkdir()
        text = (SOURCES / self.file).read_text()
        assert text.count(self.old) == 1, (
            f"{self.file} must hold {self.old!r} once, it does {text.count(self.old)} times"
        )
        units = self.units or (self.file,)
        for unit in units:  # beside the file, so that they include the copy
            (folder / unit).write_text((SOURCES / unit).read_text())
        (folder / self.file).write_text(text.replace(self.old, self.new))
        replaced = {unit: build.compile(folder / unit, folder / f"{unit}.o", "-w") for unit in units}
        return build.driver(folder / "driver", replaced)


_SHRINK = ("shrink.cu", "shrink_tensor_cores.cu")

MUTANTS = {
    # the mathematics
    "core not transposed in backward": Mutant(
        "core.cuh", "transposed ? q * k + a : a * k + q", "a * k + q", "values", _SHRINK
    ),
    "only the first group of a tile decides what is active": Mutant(
        "common.cuh", "index <= last", "index <= first", "values", ("expand.cu",)
    ),
    "lanes summed beyond the last replica": Mutant(
        "shrink.cu", "if (replica + half < left) sum[t][p] += other;", "sum[t][p] += other;", "values"
    ),
    "ranks beyond the first block dropped": Mutant(
        "shrink.cu", "params.factor.data + p0 * params", "params.factor.data + 0 * params", "values"
    ),
    "output overwritten instead of added to": Mutant(
        "expand.cu", "params.accumulate ? to_float(element) + sum[t] : sum[t]", "sum[t]", "values"
    ),
    "rows of every group summed": Mutant("core_grad.cu", "== group) {", "== group || true) {", "values"),
    "gradient of a kernel transposed": Mutant(
        "core_grad.cu", "p * k + a] * params.U[start + p * k + q]", "p * k + q] * params.U[start + p * k + a]", "values"
    ),
    "skipped scales get no gradient": Mutant(
        "shrink_tensor_cores.cu", "params.all_scales ? ~0u : active", "active", "values"
    ),
    "second round of columns reads the first": Mutant(
        "shrink_tensor_cores.cu", "wanted, start + n)", "wanted, n)", "values"
    ),
    "gradient off the diagonal": Mutant("factor_grad_tensor_cores.cu", "c % k != column % k", "c % k != 0", "values"),
    "columns that only some scales have counted for all": Mutant(
        "factor_reduce.cu", "min64((j + 1) * k, features)", "(j + 1) * k", "values"
    ),
    "kernel transposed in the dense weight": Mutant(
        "weight.cu", "kernel[row % k * k + q]", "kernel[q * k + row % k]", "values"
    ),
    "half a warp summed": Mutant("weight_grad.cu", "distance = kWarp / 2", "distance = kWarp / 4", "values"),
    "B's gradient in A's layout": Mutant(
        "delta.cu", "gradients.B, 1, problem.pyramid.rank,", "gradients.B, problem.pyramid.rank, 1,", "values"
    ),
    # memory
    "padding of the last row of X read": Mutant("shrink.cu", "if (c >= features) break;", "", "address"),
    "rows beyond the last written": Mutant("expand.cu", "if (t >= rows) break;", "", "address"),
    "rows beyond the last read": Mutant(
        "factor_grad.cu",
        "end = min64(begin + params.rows_per_chunk, params.rows)",
        "end = begin + params.rows_per_chunk",
        "address",
    ),
    "features beyond the last read": Mutant("interleave.cu", "c < params.features && ", "", "address"),
    "a tile stored without its mask": Mutant(
        "expand_tensor_cores.cu", "row >= end || c >= params.features", "c >= params.features", "address"
    ),
    "a vector load beyond the row": Mutant(
        "tensor_cores.cuh",
        "row < end && aligned && c + kVector <= x.features",
        "row < end && aligned",
        "address",
        ("factor_grad_tensor_cores.cu",),
    ),
    # races
    "core before U is complete": Mutant("shrink.cu", "  __syncthreads();\n  if (params.V", "  if (params.V", "thread"),
    "staged rows read before they are there": Mutant(
        "expand.cu", "      __syncthreads();\n    }\n    if (!inside)", "    }\n    if (!inside)", "thread"
    ),
    "stage overwritten while others read": Mutant(
        "factor_grad.cu", "__syncthreads();  // the previous block", "// the previous block", "thread"
    ),
    "staged tile multiplied before it is there": Mutant(
        "shrink_tensor_cores.cu", "      __syncthreads();\n#pragma unroll", "#pragma unroll", "thread"
    ),
    "tile read before its warp has stored it": Mutant(
        "factor_grad_tensor_cores.cu", "wmma::mem_row_major);\n      __syncwarp();", "wmma::mem_row_major);", "thread"
    ),
    "parts added up before they are there": Mutant(
        "reduce.cuh", "  __syncthreads();\n  float total", "  float total", "thread", ("core_grad.cu",)
    ),
    "two blocks write one column": Mutant(
        "factor_grad.cu", "blockIdx.x * kThreads + threadIdx.x", "blockIdx.x * (kThreads - 1) + threadIdx.x", "thread"
    ),
}
