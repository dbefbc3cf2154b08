"""The rows of ``gpu.jsonl``, and the short table that ends a run. Needs no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

Row = dict[str, object]

#: What every row says of its origin.
PROVENANCE = ("device", "device_type", "python", "torch", "triton", "peft", "ept_kernels", "gpu_runtime", "commit")

#: Stage -> the columns that say what was measured, and the numbers of which a row has one at least.
TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "machine": (("what", "dtype", "m", "k", "n"), ("TFLOP_per_s", "TB_per_s")),
    "kernels": (("in", "out", "tokens", "call"), ("us",)),
    "steps": (("model", "way", "tokens"), ("us", "ratio", "tokens_per_s", "peak_GB")),
    "tune": (("in", "out", "tokens", "best"), ("best_us", "over_cublas")),
    "counters": (("kernel",), ("us", "tensor_percent", "dram_percent")),
}


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; a line that a dying process left half written is passed over."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add a line, after whatever a dying process left half written."""
    with path.open("a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(row).encode() + b"\n")


def _cells(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """A table in Markdown."""

    def text(value: object) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(text(row.get(column)) for column in columns) + " |" for row in rows)]


def _ways(title: str, rows: Sequence[Row], value: Callable[[Row], object]) -> list[str]:
    """A line for each point, pass and manner, with a column for each way."""
    if not rows:
        return []
    keys = ("in", "out", "tokens", "tasks", "pass", "how")
    lines: dict[tuple[object, ...], Row] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[key] for key in keys), {key: row[key] for key in keys})
        line[str(row["way"])] = value(row)
    ways = dict.fromkeys(str(row["way"]) for row in rows)
    return ["", f"{title}:", "", *_cells(list(lines.values()), (*keys, *ways))]


def summary(rows: Sequence[Row]) -> str:
    """The stages, what was wrong or failed, and the numbers that decisions hang on."""
    origin = next((row for row in rows if "device" in row), {})
    lines = ["# " + ", ".join(f"{name} {origin[name]}" for name in PROVENANCE if name in origin), ""]
    if any(row.get("dry") for row in rows):
        lines += ["A dry run on a CPU: no time below means anything.", ""]
    lines += _cells(
        [row for row in rows if row.get("what") == "stage"],
        ("stage", "status", "seconds", "limit", "clocks.sm", "power.draw"),
    )
    wrong = [
        row for row in rows if row.get("right") is False or ("error" in row and row["error"] and "right" not in row)
    ]
    if wrong := [
        {**row, "what": row.get("way") or row.get("what"), "error": str(row["error"])[-160:]} for row in wrong
    ]:
        lines += ["", "Wrong or failed:", "", *_cells(wrong, ("stage", "what", "layer", "dtype", "error"))]
    judged = [row for row in rows if "right" in row]
    if judged:
        lines += ["", f"Gate: {sum(bool(row['right']) for row in judged)} of {len(judged)} right."]
    layers = [row for row in rows if row["stage"] == "layers" and "ratio" in row]
    eager = [row for row in layers if row["how"] == "eager"]
    lines += _ways(
        "layers, us of the frozen linear and ratios to it",
        layers,
        lambda row: row["us"] if row["way"] == "linear" else row["ratio"],
    )
    lines += _ways("layers, us that the host takes to enqueue", eager, lambda row: row["host_us"])
    for stage, (columns, values) in TABLES.items():
        found = [row for row in rows if row["stage"] == stage and any(row.get(value) is not None for value in values)]
        if found:
            lines += ["", f"{stage}:", "", *_cells(found, (*columns, *values))]
    return "\n".join(lines) + "\n"
