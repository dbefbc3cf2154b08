"""An inspection as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .summary import Inspection, Layer


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print everything that applies to the method, and a sentence for what does not."""
    console.print(f"[bold]{escape(inspection.method)}[/] adapter {escape(inspection.folder)}", highlight=False)
    settings = ", ".join(f"{name} {plain(value)}" for name, value in inspection.settings.items() if value is not None)
    console.print(f"base model: {escape(inspection.base_model or 'not recorded')}; {escape(settings)}", highlight=False)
    console.print(f"tasks: {escape(', '.join(inspection.tasks) or 'not recorded')}", highlight=False)
    console.print(_parameters(inspection))
    if any(layer.experts for layer in inspection.layers):
        console.print(_ranks(inspection))
    if any(layer.labels for layer in inspection.layers):
        console.print(_gates(inspection))
    if any(layer.experts and layer.labels for layer in inspection.layers):
        console.print(dead_sentence(inspection), highlight=False)
    if inspection.similarity:
        console.print(_similarity(inspection))
    for note in inspection.notes:
        console.print(escape(note), highlight=False)


def dead_sentence(inspection: Inspection) -> str:
    """How many experts no task uses, and what removing them saves."""
    dead, experts, parameters = inspection.dead
    share = parameters / inspection.total if inspection.total else 0.0
    return (
        f"dead experts (used by no task): {dead} of {experts}; without them {parameters:,} fewer numbers "
        f"({share:.1%} of the adapter), and more where a layer's smallest scale goes"
    )


def chosen(layer: Layer, task: int) -> Iterator[tuple[int, float]]:
    """The experts that a task uses in a layer, each with its weight; the heaviest first."""
    weights = layer.gates[task]
    for place in sorted(range(len(weights)), key=lambda place: -weights[place]):
        if weights[place] > 0:
            yield place, weights[place]


def plain(value: object) -> str:
    """A setting in a few words."""
    if isinstance(value, dict):
        return f"for {len(value)} layers or patterns"
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _table(title: str, caption: str | None = None) -> Table:
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")


def _parameters(inspection: Inspection) -> Table:
    table = _table("Parameters")
    for column in ("part", "numbers", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, count in {**inspection.parameters, "total": inspection.total}.items():
        share = count / inspection.total if inspection.total else 0.0
        table.add_row(escape(part), f"{count:,}", f"{share:.1%}", style="bold" if part == "total" else None)
    return table


def _ranks(inspection: Inspection) -> Table:
    r = inspection.settings["r"]
    table = _table(
        f"Effective ranks: of every expert's update, r * rank(K) = {r} * rank(K), and of each task's whole update",
        "task: rank (stable rank, entropy rank); a singular value counts above max(m, n) * eps of the stored dtype "
        "times the largest; -: dead",
    )
    table.add_column("layer", overflow="fold")
    table.add_column("kernel size: rank", overflow="fold")
    for task in inspection.tasks:
        table.add_column(escape(task), justify="right")
    for layer in inspection.layers:
        experts = "  ".join(
            f"{expert.kernel_size}:{'-' if place in layer.dead else expert.effective_rank}"
            for place, expert in enumerate(layer.experts)
        )
        updates = [f"{ranks.rank} ({ranks.stable:.1f}, {ranks.entropy:.1f})" for ranks in layer.updates]
        table.add_row(escape(layer.name), experts, *updates)
    return table


def _gates(inspection: Inspection) -> Table:
    table = _table(f"Gates: {inspection.label_kind} and weight of the experts that a task uses, heaviest first")
    table.add_column("layer", overflow="fold")
    for task in inspection.tasks:
        table.add_column(escape(task))
    for layer in inspection.layers:
        cells = []
        for number in range(len(inspection.tasks)):
            cells.append(", ".join(f"{layer.labels[place]}: {weight:.2f}" for place, weight in chosen(layer, number)))
        table.add_row(escape(layer.name), *cells)
    return table


def _similarity(inspection: Inspection) -> Table:
    table = _table("Cosine of the task embeddings")
    table.add_column("")
    for task in inspection.tasks:
        table.add_column(escape(task), justify="right")
    for task, row in zip(inspection.tasks, inspection.similarity, strict=True):
        table.add_row(escape(task), *(f"{value:.3f}" for value in row))
    return table
