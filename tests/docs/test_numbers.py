"""The tables of results are those of the recorded runs in ``benchmarks/results``."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from .conftest import ROOT

RECORDED = ROOT / "benchmarks" / "results"
SUMMARY = json.loads((RECORDED / "quality" / "summary.json").read_text())
REPORT = (RECORDED / "quality" / "report.md").read_text()
TASKS = len(SUMMARY["methods"]["ept"]["scores"])
TITLES = {
    "lora": "LoRA",
    "moelora": "MOELoRA",
    "more": "MoRE",
    "mixlora": "MixLoRA",
    "dcft": "DCFT",
    "tucka": "TuckA",
    "ept": "EPT",
}
ABLATIONS = {
    "no-top-k": "every task mixes",
    "zero-init-seed": "B starts at zero",
    "no-contrastive-loss": "no contrastive loss",
    "all-2": "eight experts of scale 2",
    "no-alp-scaling": "no dimension-aware scale",
    "all-8": "eight experts of scale 8",
}


def _row(page: Path, section: str, title: str) -> list[str]:
    """Cells of the only row of a section's tables that begins with ``title``."""
    text = page.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (line,) = re.findall(rf"^\| \**(?:PEFT |one )?{re.escape(title)}.*\|$", text, flags=re.MULTILINE)
    return [cell.strip().strip("*") for cell in line.split("|")[1:-1]]


def _with_error(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f} ± {error:.3f}"


def _difference(title: str) -> str:
    """EPT minus a system, as the recorded report has it."""
    if title == "EPT":
        return ""
    (found,) = re.findall(rf"^- {title}: EPT (\S+) \(± (\S+) over 3 seeds\)", REPORT, flags=re.MULTILINE)
    return " ± ".join(found)


@pytest.mark.parametrize("method", SUMMARY["methods"])
def test_the_systems(method: str) -> None:
    found, title = SUMMARY["methods"][method], TITLES[method]
    trained, score = f"{found['parameters'] / TASKS:,.0f}", _with_error(found["mean"], found["standard_error"])
    assert _row(ROOT / "README.md", "Results", title)[1:] == [trained, score, _difference(title)]
    _, rate, *rest, seeds = _row(ROOT / "docs" / "results.md", "Seven systems on six GLUE tasks", title)
    assert rest == [trained, score, _difference(title)]
    assert (float(rate), int(seeds)) == (found["lr"], found["seeds"])


@pytest.mark.parametrize("name", SUMMARY["ablations"])
def test_the_ablations(name: str) -> None:
    found = SUMMARY["ablations"][name]
    _, score, difference, published = _row(ROOT / "docs" / "results.md", "Ablations", ABLATIONS[name])
    recorded = re.findall(rf"^\| {name} .*\| (\S+) \(± (\S+) over 3 seeds\) \| (\S+) \|$", REPORT, flags=re.MULTILINE)
    assert score == _with_error(found["mean"], found["standard_error"])
    assert [(*difference.split(" ± "), published)] == recorded


# ---- the recipe


def _runs(method: str, rate: float, seeds: Sequence[int], similarity: Sequence[float | None]) -> list[dict]:
    lines = [json.loads(line) for line in (RECORDED / "recipe.jsonl").read_text().splitlines()]
    kept = {}
    for run in lines:
        extra = dict(run.get("set") or {})
        same = extra.pop("task_similarity", None) in similarity and not extra
        if (run["method"], run["lr"], run["steps"]) == (method, rate, 800) and same and run["seed"] in seeds:
            kept[run["seed"]] = [*run["scores"].values(), run["mean"], run["test"]["mrpc"]]
    assert sorted(kept) == list(seeds)
    return [kept[seed] for seed in seeds]


def _cells(rows: list[list[float]], sign: str = "") -> list[str]:
    columns = list(zip(*rows, strict=True))
    errors = [statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0.0 for column in columns]
    means = [statistics.mean(column) for column in columns]
    return [
        _with_error(mean, error, sign) if error else f"{mean:.3f}" for mean, error in zip(means, errors, strict=True)
    ]


def test_the_recipe() -> None:
    def row(title: str) -> list[str]:
        return _row(ROOT / "docs" / "recipe.md", "Beside LoRA, after 800 steps", title)[1:]

    lora, ours = _runs("lora", 5e-4, range(4), [None]), _runs("ept", 1.5e-3, range(4), [None])
    assert row("LoRA r = 8, 5e-4") == _cells(lora)
    assert row("EPT, defaults") == _cells(ours)
    assert row("LoRA r = 8, 1e-3") == _cells(_runs("lora", 1e-3, [0], [None]))
    assert row("EPT, 3e-3") == _cells(_runs("ept", 3e-3, range(3), [0.75]))
    difference = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(ours, lora, strict=True)]
    stated = [cell.replace("+", "").replace("-0.000", "0.000") for cell in row("difference")]
    assert stated == [cell.replace("-0.000", "0.000") for cell in _cells(difference)]
