"""Draws results.png: score over trained parameters for each system of ``benchmarks/results/quality/summary.json``.

The picture carries the SHA-256 sum of the file that it was drawn from, which a test compares.

    python docs/images/results.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SUMMARY = Path(__file__).parents[2] / "benchmarks" / "results" / "quality" / "summary.json"
NAMES = {
    "lora": "one LoRA for all tasks",
    "lora-per-task": "one LoRA for each task",
    "lora-per-task-small": "one small LoRA for each task",
    "moelora": "MOELoRA",
    "more": "MoRE",
    "mixlora": "MixLoRA",
    "dcft": "DCFT",
    "tucka": "TuckA",
    "ept": "EPT",
}
ACCENT, GREY, INK = "#c2410c", "#64748b", "#1e293b"


def main() -> None:
    content = SUMMARY.read_bytes()
    methods = json.loads(content)["methods"]
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, found in methods.items():
        colour = ACCENT if name == "ept" else GREY
        trained = found["parameters"] / len(found["scores"])
        axes.errorbar(trained, found["mean"], found["standard_error"], fmt="o", color=colour, capsize=3)
        left = name == "ept" or trained > 300_000
        axes.annotate(
            NAMES[name],
            (trained, found["mean"]),
            xytext=(-8 if left else 8, 0),
            textcoords="offset points",
            color=colour,
            ha="right" if left else "left",
            va="bottom",
            weight="bold" if name == "ept" else "normal",
        )
    axes.set(xscale="log", xlabel="trained parameters for each task", ylabel="mean score of six GLUE tasks")
    axes.set_xlim(right=1.2e6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_axisbelow(True)
    summary = hashlib.sha256(content).hexdigest()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130, metadata={"Software": None, "Source": summary})


if __name__ == "__main__":
    main()
