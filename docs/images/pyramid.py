"""Draws pyramid.png: one seed, an expert of each scale, and the update that a task mixes of two of them.

Every matrix in the picture is computed as the method computes it, for a layer of 48 x 48 with rank 3.

    python docs/images/pyramid.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch, Rectangle

SIZE, RANK, SCALES = 48, 3, (2, 4, 6, 8)
COLOURS = {2: "#0369a1", 4: "#15803d", 6: "#b45309", 8: "#b91c1c"}
TASKS = {"task A": {2: 0.7, 6: 0.3}, "task B": {4: 0.6, 8: 0.4}}
INK = "#1e293b"


def show(figure: plt.Figure, place: tuple[float, float, float], matrix: np.ndarray, colour: str) -> Axes:
    """``matrix`` as a square heat map; ``place`` is left, bottom and side, as shares of the figure's width."""
    left, bottom, side = place
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left, bottom * width / height, side, side * width / height))
    axes.imshow(matrix, cmap="RdBu_r", vmin=-np.abs(matrix).max(), vmax=np.abs(matrix).max(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.5)
    return axes


def arrow(start: Axes, end: Axes, colour: str, width: float = 1.4) -> None:
    """From the right edge of one matrix to the left edge of another."""
    patch = ConnectionPatch(
        (1, 0.5), (0, 0.5), "axes fraction", "axes fraction", axesA=start, axesB=end, arrowstyle="-|>",
        color=colour, linewidth=width, shrinkA=4, shrinkB=4,
    )  # fmt: skip
    start.figure.add_artist(patch)


def main() -> None:
    random = np.random.default_rng(4)
    seed = random.normal(size=(SIZE // 2, RANK)) @ random.normal(size=(RANK, SIZE // 2))
    kernels = {k: random.normal(size=(k, k)) for k in SCALES}
    experts = {k: np.kron(seed[: SIZE // k, : SIZE // k], kernels[k]) for k in SCALES}

    plt.rcParams["font.size"] = 10
    figure = plt.figure(figsize=(11, 5.2), facecolor="white")
    note = {"ha": "center", "color": INK, "linespacing": 1.5}

    whole = show(figure, (0.03, 0.150, 0.18), seed, INK)
    for k in SCALES:
        corner = SIZE // k
        whole.add_patch(Rectangle((-0.5, -0.5), corner, corner, fill=False, edgecolor=COLOURS[k], linewidth=2.2))
        whole.text(corner - 1, corner - 1.1, f"k = {k}", color=COLOURS[k], ha="right", va="bottom", weight="bold",
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}, fontsize=8.5)  # fmt: skip
    figure.text(0.12, 0.93, "one seed  Z = B A", weight="bold", **note)
    figure.text(0.12, 0.12, "low rank, shared by all experts;\na scale k reads one corner of it", **note)

    figure.text(0.335, 0.93, "a kernel for each expert", weight="bold", **note)
    figure.text(0.545, 0.93, "experts  corner ⊗ K", weight="bold", **note)
    drawn = {}
    for row, k in enumerate(SCALES):
        bottom = 0.333 - 0.1 * row
        side = 0.01 * k
        kernel = show(figure, (0.335 - side / 2, bottom + 0.04 - side / 2, side), kernels[k], COLOURS[k])
        drawn[k] = show(figure, (0.505, bottom, 0.08), experts[k], COLOURS[k])
        arrow(kernel, drawn[k], COLOURS[k])
        arrow(whole, kernel, COLOURS[k])
    figure.text(0.335, 0.895, "k × k numbers", va="top", **note)

    figure.text(0.86, 0.93, "one update for each task", weight="bold", **note)
    for row, (name, gates) in enumerate(TASKS.items()):
        update = sum(gate * experts[k] for k, gate in gates.items())
        axes = show(figure, (0.80, 0.265 - 0.17 * row, 0.12), update, INK)
        for k, gate in gates.items():
            arrow(drawn[k], axes, COLOURS[k], width=4 * gate)
        axes.text(1.07, 0.5, f"{name}\n" + "\n".join(f"{gate} · k = {k}" for k, gate in gates.items()),
                  transform=axes.transAxes, va="center", color=INK, fontsize=8.5, linespacing=1.6)  # fmt: skip
    figure.text(0.86, 0.09, "a router mixes two experts;\nmerged into W0 the update costs nothing", **note)

    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
