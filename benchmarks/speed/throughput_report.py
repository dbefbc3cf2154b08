"""Tables and plots of ``throughput.py``, from its CSV file and nothing else.

A row whose result was wrong has no time, and these functions print its error instead of a ratio.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from candidates import title
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import COLUMNS, FAILED, OK, PASSES

AXES = ("shape", "tokens", "tasks", "experts", "dtype")
_DPI = 160
_COLOURS = colormaps["tab10"].colors

Row = dict[str, str]


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Append rows; a new file starts with the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file that ``write_rows`` made.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it lacks a column or has no row.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        rows = list(reader)
    if missing:
        raise ValueError(f"{str(path)!r} lacks the columns {', '.join(sorted(missing))}")
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows")
    return rows


def _point(row: Row) -> tuple[str, ...]:
    return tuple(row[axis] for axis in AXES)


# --- the markdown table -----------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """One table for each point, candidates as lines; where the numbers come from stands above them."""
    first = rows[0]
    lines = [
        f"{first['device']}, {first['threads']} CPU threads; torch {first['torch']}, peft {first['peft']}, ept-kernels "
        f"{first['ept_kernels']}, triton {first['triton']}, Python {first['python']}; commit {first['commit']}.",
        "Medians of alternating rounds, with 20 % and 80 % quantiles. Ratio: time over that of the frozen linear in "
        "the same round; less is better. Memory of forward+backward beyond parameters and x: peak "
        f"({_peak_method(rows)}) and what is kept for the backward pass. Error: the one closest to its limit among "
        "output and gradients, against float64.",
    ]
    for point in dict.fromkeys(map(_point, rows)):
        here = [row for row in rows if _point(row) == point]
        lines += ["", _heading(here[0]), "", *_table(here)]
    return "\n".join(lines) + "\n"


def _peak_method(rows: Sequence[Row]) -> str:
    return next(row["peak_method"] for row in rows if row["peak_method"])


def _heading(row: Row) -> str:
    counts = ", ".join(
        f"{row[name]} {name if row[name] != '1' else name[:-1]}" for name in ("tokens", "tasks", "experts")
    )
    return (
        f"**{row['shape']}** ({row['in_features']} to {row['out_features']}), {counts}, {row['dtype']}; "
        f"{row['rounds']} rounds, {_load(row)}"
    )


def _load(row: Row) -> str:
    """The load average, and what it means where more processes wanted a CPU than there are."""
    noisy = bool(row["load"]) and float(row["load"]) > int(row["cpus"])
    return f"load average {row['load'] or 'unknown'} on {row['cpus']} CPUs" + (": noisy" if noisy else "")


def _table(rows: Sequence[Row]) -> list[str]:
    head = ["", "forward tokens/s", "ratio", "forward+backward tokens/s", "ratio", "peak MB", "kept MB", "error"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for candidate in dict.fromkeys(row["candidate"] for row in rows):
        forward, both = (
            next(row for row in rows if row["candidate"] == candidate and row["pass"] == which) for which in PASSES
        )
        cells = [title(candidate), *_speed(forward), *_speed(both)]
        cells += [f"{float(both[name]) / 1e6:.1f}" if both[name] else "" for name in ("peak_bytes", "saved_bytes")]
        cells.append(f"{float(both['error']):.1e}" if both["error"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _speed(row: Row) -> tuple[str, str]:
    if row["status"] != OK:
        return ("failed" if row["status"] == FAILED else "refused"), row["note"].replace("|", "/")
    ratio = f"{float(row['ratio']):.2f} ({float(row['ratio_low']):.2f} to {float(row['ratio_high']):.2f})"
    return f"{float(row['tokens_per_s']):,.0f}", ratio


# --- plots ------------------------------------------------------------------------------------------------------------


def plots(csv_file: Path, folder: Path) -> list[Path]:
    """Draw what a CSV file holds: the ratio along every axis that varies, and memory. The files drawn."""
    rows = [row for row in read_rows(csv_file) if row["status"] == OK]
    if not rows:
        raise ValueError(f"{str(csv_file)!r} has no row with a time")
    centre = dict(zip(AXES, _point(rows[0]), strict=True))
    drawn = []
    for axis in AXES:
        others = [name for name in AXES if name != axis]
        along = [row for row in rows if all(row[name] == centre[name] for name in others)]
        if len({row[axis] for row in along}) > 1:
            drawn.append(_save(_ratio_figure(along, axis, centre), folder / f"ratio_by_{axis}.png"))
    here = [row for row in rows if _point(row) == tuple(centre.values())]
    drawn.append(_save(_ratio_bars(here, centre), folder / "ratio.png"))
    drawn.append(_save(_memory_bars(here, centre), folder / "memory.png"))
    return drawn


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["candidate"] for row in rows))


def _where(centre: dict[str, str], besides: str | None = None) -> str:
    words = {"shape": "{}", "tokens": "{} tokens", "tasks": "{} tasks", "experts": "{} experts", "dtype": "{}"}
    return ", ".join(words[axis].format(value) for axis, value in centre.items() if axis != besides)


def _ratio_figure(rows: Sequence[Row], axis: str, centre: dict[str, str]) -> Figure:
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, len(PASSES))
    values = list(dict.fromkeys(row[axis] for row in rows))
    if axis not in ("shape", "dtype"):
        values.sort(key=float)
    for panel, which in zip(panels, PASSES, strict=True):
        for place, name in enumerate(_names(rows)):
            mine = {row[axis]: row for row in rows if row["candidate"] == name and row["pass"] == which}
            spots = [spot for spot, value in enumerate(values) if value in mine]
            _points(panel, spots, [mine[values[spot]] for spot in spots], place, title(name))
        panel.set_xticks(range(len(values)), values, rotation=20 if axis == "shape" else 0)
        panel.set_xlabel(axis)
        _finish(panel, which)
    panels[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{rows[0]['device']}: {_where(centre, axis)}", fontsize=9)
    return figure


def _points(panel: Axes, spots: Sequence[int], rows: Sequence[Row], place: int, label: str) -> None:
    middle = [float(row["ratio"]) for row in rows]
    below = [value - float(row["ratio_low"]) for value, row in zip(middle, rows, strict=True)]
    above = [float(row["ratio_high"]) - value for value, row in zip(middle, rows, strict=True)]
    panel.errorbar(
        spots, middle, yerr=[below, above], marker="o", ms=3, lw=1.2, capsize=2, color=_colour(place), label=label
    )


def _ratio_bars(rows: Sequence[Row], centre: dict[str, str]) -> Figure:
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, len(PASSES), sharey=True)
    names = _names(rows)
    for panel, which in zip(panels, PASSES, strict=True):
        for row in (row for row in rows if row["pass"] == which):
            place, ratio = names.index(row["candidate"]), float(row["ratio"])
            error = [[ratio - float(row["ratio_low"])], [float(row["ratio_high"]) - ratio]]
            panel.barh(place, ratio, xerr=error, color=_colour(place), error_kw={"lw": 0.8})
        panel.axvline(1.0, color="black", lw=0.8, ls=":")
        panel.set_yticks(range(len(names)), [title(name) for name in names], fontsize=8)
        panel.set_xlabel("time / frozen linear")
        panel.set_title(which, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(f"{rows[0]['device']}: {_where(centre)}", fontsize=9)
    return figure


def _memory_bars(rows: Sequence[Row], centre: dict[str, str]) -> Figure:
    rows = [row for row in rows if row["pass"] == PASSES[-1]]
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    columns = {"peak_bytes": f"peak ({rows[0]['peak_method']})", "saved_bytes": "kept for backward"}
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        for place, row in enumerate(rows):
            panel.barh(place, float(row[column]) / 1e6, color=_colour(place))
        panel.set_yticks(range(len(rows)), [title(row["candidate"]) for row in rows], fontsize=8)
        panel.set_xlabel("MB")
        panel.set_title(f"{PASSES[-1]}: {label}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(f"{rows[0]['device']}: {_where(centre)}", fontsize=9)
    return figure


def _colour(place: int) -> tuple[float, ...]:
    return _COLOURS[place % len(_COLOURS)]


def _finish(panel: Axes, which: str) -> None:
    panel.set_title(which, fontsize=9)
    panel.set_ylabel("time / frozen linear")
    panel.axhline(1.0, color="black", lw=0.8, ls=":")
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path
