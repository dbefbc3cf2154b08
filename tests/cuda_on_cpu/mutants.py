"""Faults planted in the kernels, each a replacement of text, and what has to notice it.

``values``: the comparison with float64. ``address`` and ``thread``: the sanitizers, where the numbers may come out
right: reads beyond an array, barriers that only luck replaces.
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
    check: str  # of checks.SAMPLE
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


MUTANTS = {
    # the mathematics
    "a factor read by the other's stride": Mutant(
        "interleave.cu", "left ? params.b_rank : params.a_rank", "params.a_rank", "values", "interleave"
    ),
    "off the diagonal": Mutant("interleave.cu", "slot == q && first", "slot == 0 && first", "values", "interleave"),
    "slots that do not start again": Mutant(
        "interleave.cu", "if (++slot == k) slot = 0, ++j;", "if (++slot == k) ++j;", "values", "interleave"
    ),
    "B's gradient in A's layout": Mutant(
        "gather.cu", "params.B[static_cast<int64_t>(j) * rank + p]", "params.B[index]", "values", "gather"
    ),
    "copies summed along a row": Mutant(
        "gather.cu",
        "q * (static_cast<int64_t>(features) + 1)",
        "q * (static_cast<int64_t>(features))",
        "values",
        "gather",
    ),
    "core not transposed in backward": Mutant("core.cu", "&& transposed) {", "&& false) {", "values", "core"),
    "core of any scale not transposed": Mutant("core.cu", "transposed ? 1 : k", "k", "values", "core, half"),
    "an inactive scale read": Mutant("core.cu", "params.active != nullptr && !", "false && !", "values", "core"),
    "an inactive scale's gradient summed": Mutant(
        "core.cu",
        "params.active == nullptr || params.active[group * pyramid.count + block.s]",
        "true",
        "values",
        "core",
    ),
    "rows without a group are zero": Mutant(
        "core.cu", "return {nullptr, NAN};", "return {nullptr, 0.0f};", "values", "core, unknown groups"
    ),
    "rows of every group summed": Mutant("core.cu", "group_of(params, row) == group;", "true;", "values", "core"),
    "gradient of a kernel transposed": Mutant(
        "core.cu",
        "static_cast<const T*>(params.U) + block.column + q",
        "static_cast<const T*>(params.U) + block.column + a",
        "values",
        "core",
    ),
    "ranks one apart": Mutant(
        "core.cu", "to_float(U[place + static_cast<int64_t>(p) * k])", "to_float(U[place + p])", "values", "core"
    ),
    "spans dropped": Mutant("core.cu", "span += kSumWarps) {", "span += 2 * kSumWarps) {", "values", "core, spans"),
    "64-bit ids read as 32": Mutant("core.cu", "return params.wide_ids ?", "return false ?", "values", "core"),
    "a row's id taken for the row before": Mutant("core.cu", "params.rows_per_id != 1", "false", "address", "core"),
    "nine rounds": Mutant("dropout.cu", "kRounds = 10", "kRounds = 9", "values", "dropout"),
    "a mask that does not know its row": Mutant(
        "dropout.cu", "static_cast<uint64_t>(row));", "0);", "values", "dropout"
    ),
    "overwritten instead of added to": Mutant(
        "dropout.cu", "params.accumulate ? to_float(old.value[v]) + kept : kept", "kept", "values", "dropout, added"
    ),
    "half a warp summed": Mutant(
        "common.cuh", "distance = kWarp / 2", "distance = kWarp / 4", "values", "fold", ("fold.cu",)
    ),
    "ties go to the last": Mutant("fold.cu", "&& e < own)", "&& e > own)", "values", "fold, corners"),
    "one expert more than selected": Mutant(
        "fold.cu", "before < params.top_k", "before <= params.top_k", "values", "fold"
    ),
    "a share of all instead of the selected": Mutant(
        "fold.cu", "shared.power[own] / chosen", "shared.power[own] / all", "values", "fold"
    ),
    "an ALP factor lost in backward": Mutant(
        "fold.cu", "sum * experts.factor[e];\n      shared", "sum;\n      shared", "values", "fold"
    ),
    "the one gate's gradient that of a sum": Mutant("fold.cu", "? others :", "? 1.0f :", "values", "fold, one expert"),
    "all groups summed for a task": Mutant("fold.cu", "!= task) continue;", "!= task) {}", "values", "fold"),
    # memory
    "vectors where rows are not aligned": Mutant(
        "interleave.cu",
        "features % kSize == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(vector) == 0",
        "true",
        "address",
        "interleave",
    ),
    "features beyond the last read": Mutant(
        "interleave.cu", "slot == q && first + v < features", "slot == q", "address", "interleave"
    ),
    "features beyond the last written": Mutant(
        "interleave.cu", "if (first + v < features) out", "out", "address", "interleave, fp32"
    ),
    "slots beyond the last feature": Mutant(
        "gather.cu", "smaller<int64_t>(k, features - first)", "k", "address", "gather"
    ),
    "numbers beyond the last rank": Mutant(
        "gather.cu", " || index >= static_cast<int64_t>(rank) * size", "", "address", "gather, one"
    ),
    "rows beyond the last": Mutant(
        "core.cu", "smaller<int64_t>(rows, params.rows - begin)", "rows", "address", "core, unknown groups"
    ),
    "a kernel of a group that is not there": Mutant(
        "core.cu", "group < 0 || group >= params.groups", "false", "address", "core, unknown groups"
    ),
    "ids beyond the last row": Mutant("core.cu", "row < end && group_of", "group_of", "address", "core, half"),
    "entries beyond the last": Mutant("core.cu", "  if (!exists) return;\n", "", "address", "core"),
    "columns beyond the last": Mutant("dropout.cu", "v < count ? x[v]", "true ? x[v]", "address", "dropout"),
    "a task that the table lacks": Mutant(
        "fold.cu", "task >= 0 && task < params.num_tasks", "true", "address", "fold, corners"
    ),
    "numbers beyond the last kernel": Mutant("fold.cu", "if (number >= params.numbers) return;", "", "address", "fold"),
    # races
    "flags replaced while others read": Mutant(
        "core.cu", "__syncthreads();  // the next rows' flags", "// the next rows' flags", "thread", "core, one span"
    ),
    "flags read before they are there": Mutant(
        "core.cu", "if (!__syncthreads_or(own)) continue;", "", "thread", "core"
    ),
    "parts added up before they are there": Mutant(
        "core.cu", "[lane] = sum;\n  __syncthreads();", "[lane] = sum;", "thread", "core, spans"
    ),
    "two blocks write one row": Mutant(
        "core.cu",
        "blockIdx.x / pyramid.count) * rows;",
        "blockIdx.x / pyramid.count) * (rows - 1);",
        "thread",
        "core, unknown groups",
    ),
    "two threads write one entry": Mutant(
        "dropout.cu", "kThreads + threadIdx.x, first", "kThreads + threadIdx.x / 2, first", "thread", "dropout, added"
    ),
    "two threads sum one number": Mutant(
        "gather.cu", "blockIdx.x) * kThreads +", "blockIdx.x) * (kThreads - 1) +", "thread", "gather, one"
    ),
    "logits compared before they are there": Mutant(
        "fold.cu",
        "  __syncthreads();\n  if (own < experts.count) {\n    // NaN",
        "  if (own < experts.count) {\n    // NaN",
        "thread",
        "fold",
    ),
    "slopes compared before they are there": Mutant(
        "fold.cu",
        "  __syncthreads();\n  if (own >= experts.count) return;",
        "  if (own >= experts.count) return;",
        "thread",
        "fold",
    ),
}
