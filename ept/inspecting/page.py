"""An inspection in files: one HTML page that needs no network and no other file, and heat maps."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .. import plots
from ..files import write_atomically
from ..saved import SavedAdapter
from .console import dead_sentence, plain
from .summary import Inspection, Layer


def write_page(path: str | Path, inspection: Inspection) -> Path:
    """Write the page as an HTML file."""
    text = page(inspection)
    return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def page(inspection: Inspection) -> str:
    """The page's HTML.

    Every name is escaped, and the page's own policy runs no script but ours (by its hash) and loads nothing.
    """
    style, script = (files("ept.inspecting").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        ("overview", "Overview", _overview(inspection)),
        ("layers", "Layers", _layers(inspection)),
        ("gates", "Gates", _gates(inspection)),
        ("ranks", "Effective ranks", _ranks(inspection)),
        ("similarity", "Likeness of tasks", _similarity(inspection)),
    ]
    sections = [section for section in sections if section[2]]
    title = escape(f"{inspection.method} adapter {inspection.folder}")
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{name}</h2>{content}</section>'
        for key, name, content in sections
    )
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in inspection.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(inspection.method)} adapter</h1><p class="path">{escape(inspection.folder)}</p>
<nav aria-label="Sections">{links}</nav></header>
<main>{body}{notes}
<noscript><p class="note">Heat maps, sorting and the filter need JavaScript; --json has the numbers.</p></noscript>
</main>
<script type="application/json" id="data">{_json(inspection)}</script>
<script>{script}</script>
</body>
</html>
"""


def _json(inspection: Inspection) -> str:
    """The numbers behind the heat maps, as text that cannot end the element that holds it."""
    content = {
        "tasks": inspection.tasks,
        "kind": inspection.label_kind,
        "layers": [
            {
                "name": layer.name,
                "labels": layer.labels,
                "gates": [[round(weight, 4) for weight in row] for row in layer.gates],
                "experts": [[expert.effective_rank, round(expert.norm, 3)] for expert in layer.experts],
                "dead": layer.dead,
                "updates": [[u.rank, round(u.stable, 2), round(u.entropy, 2), round(u.norm, 4)] for u in layer.updates],
            }
            for layer in inspection.layers
        ],
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _overview(inspection: Inspection) -> str:
    dead, experts, _ = inspection.dead
    cards = [("trained numbers", f"{inspection.total:,}"), ("layers", str(len(inspection.layers)))]
    cards.append(("tasks", str(len(inspection.tasks))))
    has_experts = any(layer.experts and layer.labels for layer in inspection.layers)
    if has_experts:
        cards.append(("dead experts", f"{dead} of {experts}"))
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards)
    settings = [("base model", inspection.base_model or "not recorded"), ("tasks", ", ".join(inspection.tasks))]
    settings += [(name, plain(value)) for name, value in inspection.settings.items() if value is not None]
    rows = [[escape(name), escape(str(value))] for name, value in settings]
    parts = [
        [escape(part), _bar(count, inspection.total, f"{count:,}"), f"{count / inspection.total:.1%}"]
        for part, count in inspection.parameters.items()
    ]
    dead_text = f"<p>{escape(dead_sentence(inspection).capitalize())}.</p>" if has_experts else ""
    tables = _table("Parameters", ["part", "numbers", "share"], parts) + _table("Settings", ["name", "value"], rows)
    return f'<dl class="cards">{shown}</dl>{dead_text}<div class="columns">{tables}</div>'


def _bar(value: float, whole: float, text: str) -> str:
    return f'<span class="bar" style="--share:{value / whole:.4f}">{text}</span>'


def _layers(inspection: Inspection) -> str:
    pyramid = any(layer.experts for layer in inspection.layers)
    columns = ["layer", "numbers"]
    if pyramid:
        columns += ["size, at most", "experts by size: effective rank", "dead", "highest rank", "mean entropy rank"]
    rows = [_layer_row(layer, pyramid) for layer in inspection.layers]
    if not rows:
        return ""
    table = _table("Every adapted layer; a heading sorts", columns, rows, sortable=True)
    return (
        '<p><label for="filter">Show layers whose name contains</label> '
        '<input id="filter" type="search" autocomplete="off" spellcheck="false"> '
        f'<output id="shown" for="filter">{len(rows)} of {len(rows)}</output></p>{table}'
    )


def _layer_row(layer: Layer, pyramid: bool) -> list[str]:
    row = [escape(layer.name), f"{layer.parameters:,}"]
    if not pyramid:
        return row
    experts = " ".join(
        f'<span class="{"dead" if place in layer.dead else "expert"}">'
        f"{expert.kernel_size}:{expert.effective_rank}</span>"
        for place, expert in enumerate(layer.experts)
    )
    highest = max((ranks.rank for ranks in layer.updates), default=0)
    entropy = sum(ranks.entropy for ranks in layer.updates) / max(len(layer.updates), 1)
    size = f"{layer.out_features}\u00a0x\u00a0{layer.in_features}"
    return [*row, size, experts, str(len(layer.dead)), str(highest), f"{entropy:.1f}"]


def _gates(inspection: Inspection) -> str:
    if not any(layer.labels for layer in inspection.layers):
        return ""
    choices = _choices("task", "Task", inspection.tasks)
    return (
        f"<p>Weight that the task gives each expert (columns: {escape(inspection.label_kind)}). Point at a cell, or "
        "move with the arrow keys, to read it; a dotted cell is an expert that no task uses.</p>"
        f"{choices}{_grid('gate-grid')}"
    )


def _ranks(inspection: Inspection) -> str:
    if not any(layer.updates for layer in inspection.layers):
        return ""
    measures = ("entropy rank", "stable rank", "rank", "norm")
    return (
        "<p>Of each task's whole update in a layer. An expert's own rank is r * rank(K), "
        f"r = {inspection.settings['r']}.</p>"
        f"{_choices('measure', 'Measure', measures)}{_grid('rank-grid')}"
    )


def _choices(name: str, legend: str, values: Sequence[str]) -> str:
    radios = "".join(
        f'<label><input type="radio" name="{name}" value="{place}"{" checked" if place == 0 else ""}> '
        f"{escape(value)}</label>"
        for place, value in enumerate(values)
    )
    return f'<fieldset class="choices"><legend>{legend}</legend>{radios}</fieldset>'


def _grid(key: str) -> str:
    reading = f'<output class="reading" id="{key}-reading" aria-live="polite">&nbsp;</output>'
    return f'{reading}<div class="scroll" id="{key}"></div>'


def _similarity(inspection: Inspection) -> str:
    if len(inspection.tasks) < 2 or not inspection.similarity:
        return ""
    head = "".join(f'<th scope="col">{escape(task)}</th>' for task in inspection.tasks)
    rows = "".join(
        f'<tr><th scope="row">{escape(task)}</th>'
        + "".join(f'<td class="heat" style="--v:{abs(value):.3f}">{value:.3f}</td>' for value in row)
        + "</tr>"
        for task, row in zip(inspection.tasks, inspection.similarity, strict=True)
    )
    return (
        '<div class="scroll"><table class="grid"><caption>Cosine of the task embeddings</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, sortable: bool = False) -> str:
    """A table whose cells are HTML already; the first of a row is its heading."""
    names = [f'<button type="button">{name}</button>' if sortable else name for name in columns]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    attributes = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{attributes}><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def draw_inspection(folder: str | Path, inspection: Inspection, saved: SavedAdapter) -> list[Path]:
    """Write into ``folder`` what the method has: expert use per task, effective ranks, the map of the task embeddings.

    Files of these names are replaced, others are left. Returns the paths.
    """
    folder, written = Path(folder), []
    layers = [layer for layer in inspection.layers if layer.labels]
    if layers:
        routing = {}
        for layer in layers:
            gates = torch.tensor(layer.gates)
            routing[layer.name] = (torch.arange(len(layer.labels)).expand(len(gates), -1), gates)
        labels = {layer.name: layer.labels for layer in layers}
        path = folder / "expert_use.png"
        written.append(plots.expert_use(routing, labels, inspection.tasks, path, kind=inspection.label_kind))
    if any(layer.updates for layer in layers):
        written.append(_update_ranks(inspection, folder / "update_ranks.png"))
    if len(inspection.tasks) > 1 and inspection.similarity:
        embeddings = saved.shared["weight" if "weight" in saved.shared else "embedding"]
        written.append(plots.task_map(embeddings, inspection.tasks, folder / "task_embeddings.png"))
    return written


def _update_ranks(inspection: Inspection, path: Path) -> Path:
    """Entropy rank of each task's update (columns) in each layer (rows)."""
    values = torch.tensor([[ranks.entropy for ranks in layer.updates] for layer in inspection.layers]).numpy()
    figure = Figure(figsize=(5.0 + 0.7 * values.shape[1], 1.2 + 0.22 * values.shape[0]), layout="constrained")
    panel = figure.subplots()
    image = plots.heat_map(panel, values, max(float(values.max()), 1.0), digits=1)
    panel.set_xticks(range(values.shape[1]), inspection.tasks, fontsize=8)
    panel.set_yticks(range(values.shape[0]), [layer.name for layer in inspection.layers], fontsize=6)
    panel.tick_params(length=0)
    panel.set_title("Directions that a task's update uses (entropy rank)", fontsize=10)
    figure.colorbar(image, ax=panel, aspect=40)
    return plots.save_figure(figure, path)
