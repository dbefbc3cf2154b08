"""An inspection as heat maps in files."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from ept.inspecting.folder import SavedAdapter
from ept.inspecting.summary import Inspection
from ept.training import plots


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
