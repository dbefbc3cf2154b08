"""Pictures of a run: losses, which experts each task uses, and where the task embeddings lie."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from .files import write_atomically

COLOURS = "viridis"
_DPI = 200
_PANELS_A_ROW = 4

#: What every expert is, in all layers alike or by the layer's name.
Labels = Sequence[int] | Mapping[str, Sequence[int]]


def loss_curves(history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """Draw the losses, and ``eval_mean`` where it was measured, over the steps of a trainer's log history.

    Raises:
        ValueError: the history has no training loss.
    """
    entries = [entry for entry in history if "loss" in entry]
    if not entries:
        raise ValueError("history has no entry with a training loss")
    scores = [(entry["step"], entry["eval_mean"]) for entry in history if "eval_mean" in entry and entry["step"] > 0]
    names = ["loss", *(name for name in entries[0] if name.endswith("_loss"))]
    figure = Figure(figsize=(9.6 if scores else 5.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    colours = _colours(len(names))
    for colour, name in zip(colours, names, strict=True):
        values = [(entry["step"], entry[name]) for entry in entries if name in entry]
        _curve(panels[0], values, colour, _loss_label(name))
    _finish(panels[0], "Training loss", "loss")
    panels[0].legend(frameon=False)
    if scores:
        _curve(panels[1], scores, colours[0], None)
        _finish(panels[1], "Validation, mean over tasks", "headline metric")
    return save_figure(figure, path)


def _loss_label(name: str) -> str:
    words = {"loss": "total", "task_loss": "task"}
    return words.get(name, name.removesuffix("_loss").replace("_", " ") + " (unweighted)")


def expert_use(
    routing: Mapping[str, tuple[Tensor, Tensor]],
    labels: Labels,
    task_names: Sequence[str],
    path: str | Path,
    *,
    kind: str = "kernel size",
) -> Path:
    """Draw, per group of layers, the share of gate weight that each task (row) gives the experts of a label (column).

    Args:
        routing: layer name -> (expert index ``[T, top_k]``, gates ``[T, top_k]``), as from ``ept.routing``. Layers that
            differ only in their block's number form a group.
        labels: label of every expert, for EPT its kernel size; or these by layer, where layers differ.
        task_names: T names.
        kind: what a label is.
    """
    groups = _layer_groups(routing, labels)
    distinct = _distinct(labels)
    rows = math.ceil(len(groups) / _PANELS_A_ROW)
    columns = math.ceil(len(groups) / rows)
    highest = max(share.max() for share in groups.values())
    height = 0.9 + 0.3 * len(task_names)
    figure = Figure(figsize=(1.9 + 0.55 * len(distinct) * columns, 0.9 + height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for place, panel in enumerate(panels.flat):
        if place >= len(groups):
            panel.set_axis_off()
            continue
        name, share = list(groups.items())[place]
        image = heat_map(panel, share, highest)
        panel.set_title(name, fontsize=9)
        panel.set_xticks(range(len(distinct)), [str(label) for label in distinct], fontsize=8)
        panel.set_yticks(range(len(task_names)), task_names if place % columns == 0 else [], fontsize=8)
        panel.tick_params(length=0)
    figure.suptitle(f"Expert use per task and {kind}", fontsize=11)
    figure.supxlabel(kind, fontsize=9)
    bar = figure.colorbar(image, ax=panels, shrink=0.9, aspect=25)
    bar.set_label("share of gate weight, mean over layers", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return save_figure(figure, path)


def task_map(embeddings: Tensor, task_names: Sequence[str], path: str | Path) -> Path:
    """Draw the first two principal components of the task embeddings ``[T, d]``.

    Raises:
        ValueError: fewer than two tasks, or not one name per embedding.
    """
    if len(embeddings) != len(task_names) or len(task_names) < 2:
        raise ValueError(f"embeddings of {len(embeddings)} tasks and {len(task_names)} names; need at least 2, as many")
    points, shares = _principal_components(embeddings.detach().float().cpu().numpy())
    figure = Figure(figsize=(4.8, 4.0), layout="constrained")
    panel = figure.subplots()
    panel.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    panel.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    panel.scatter(points[:, 0], points[:, 1], c=_colours(len(points)), s=48, edgecolors="black", linewidths=0.5)
    panel.margins(0.25)
    panel.set_aspect("equal", adjustable="datalim")
    _label_points(panel, points, task_names)
    for set_label, axis, share in ((panel.set_xlabel, 1, shares[0]), (panel.set_ylabel, 2, shares[1])):
        set_label(f"component {axis} ({share:.0%} of variance)")
    panel.set_title("Task embeddings")
    return save_figure(figure, path)


def heat_map(panel: Axes, share: np.ndarray, highest: float, *, digits: int = 2) -> AxesImage:
    """Draw numbers from 0 to ``highest``, each in its cell with so many ``digits`` after the point."""
    image = panel.imshow(share, cmap=COLOURS, vmin=0.0, vmax=highest, aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        ink = "black" if value > 0.6 * highest else "white"
        panel.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color=ink)
    return image


def gate_shares(routing: Mapping[str, tuple[Tensor, Tensor]], labels: Labels) -> dict[str, np.ndarray]:
    """Layer -> share of gate weight ``[T, distinct labels]`` that each task gives the experts of a label, ascending.

    ``labels``: label of every expert, or these by layer.
    """
    distinct = _distinct(labels)
    shares = {}
    for layer, (experts, gates) in routing.items():
        own = labels[layer] if isinstance(labels, Mapping) else labels
        place_of_expert = np.array([distinct.index(label) for label in own])
        chosen = place_of_expert[experts.cpu().numpy()]
        share = np.zeros((len(chosen), len(distinct)))
        np.add.at(share, (np.arange(len(chosen))[:, None], chosen), gates.detach().float().cpu().numpy())
        shares[layer] = share
    return shares


def _distinct(labels: Labels) -> list[int]:
    return sorted({label for own in labels.values() for label in own} if isinstance(labels, Mapping) else set(labels))


def _layer_groups(routing: Mapping[str, tuple[Tensor, Tensor]], labels: Labels) -> dict[str, np.ndarray]:
    """Group name -> share of gate weight ``[T, distinct labels]``, the mean over the group's layers."""
    groups: dict[str, list[np.ndarray]] = {}
    for layer, share in gate_shares(routing, labels).items():
        groups.setdefault(_group_name(layer), []).append(share)
    return {name: np.mean(values, axis=0) for name, values in groups.items()}


def _group_name(layer: str) -> str:
    """What follows the last number of a path: ``layer.3.attention.self.query`` -> ``attention.self.query``."""
    return re.split(r"(?:^|\.)\d+\.", layer)[-1]


def _principal_components(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two components ``[T, 2]`` and their shares of the variance; a missing second one is 0."""
    _, sizes, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
    shares = sizes**2 / max((sizes**2).sum(), np.finfo(float).tiny)
    axes, shares = axes[:2], shares[:2]
    projected = (points - points.mean(0)) @ axes.T
    missing = 2 - projected.shape[1]
    return np.pad(projected, ((0, 0), (0, missing))), np.pad(shares, (0, missing))


def _label_points(panel: Axes, points: np.ndarray, names: Sequence[str]) -> None:
    """Write each name beside its point, on the first side where it covers no other name or point."""
    figure: Any = panel.get_figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    dots = panel.transData.transform(points)
    taken: list[Any] = []
    for name, point in zip(names, points, strict=True):
        for dx, dy, horizontal, vertical in _SIDES:
            text = panel.annotate(
                name, point, (dx, dy), textcoords="offset points", ha=horizontal, va=vertical, fontsize=9
            )
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*dot) for dot in dots):
                break
            text.remove()
        else:
            text = panel.annotate(name, point, (8, 0), textcoords="offset points", va="center", fontsize=9)
            box = text.get_window_extent(renderer)
        taken.append(box)


_SIDES = (
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (8, 12, "left", "bottom"),
    (8, -12, "left", "top"),
    (-8, 12, "right", "bottom"),
    (-8, -12, "right", "top"),
)


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    return [tuple(colour) for colour in colormaps[COLOURS](np.linspace(0.05, 0.85, count))]


def _curve(panel: Axes, values: Sequence[tuple[float, float]], colour: object, label: str | None) -> None:
    marker = "o" if len(values) < 15 else None
    panel.plot(*zip(*values, strict=True), color=colour, label=label, linewidth=1.6, marker=marker, markersize=4)


def _finish(panel: Axes, title: str, y_label: str) -> None:
    panel.set_title(title)
    panel.set_xlabel("step")
    panel.set_ylabel(y_label)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a picture."""
    FigureCanvasAgg(figure)
    return write_atomically(path, lambda file: figure.savefig(file, dpi=_DPI))
