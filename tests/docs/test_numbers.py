"""The tables of results are those of the recorded runs in ``benchmarks/results``."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from .conftest import ROOT

RECORDED = ROOT / "benchmarks" / "results"
SUMMARY = json.loads((RECORDED / "quality" / "summary.json").read_text())
REPORT = (RECORDED / "quality" / "report.md").read_text()
TASKS = len(SUMMARY["methods"]["ept"]["scores"])
#: The first cell of each system's row, on both pages, and what the report calls it where that is another name.
TITLES = {
    "lora": "one LoRA r = 8 for all tasks",
    "lora-per-task": "one LoRA r = 8 for each task",
    "lora-per-task-small": "one small LoRA for each task",
    "moelora": "MOELoRA",
    "more": "MoRE",
    "mixlora": "MixLoRA",
    "dcft": "DCFT",
    "tucka": "TuckA",
    "ept": "EPT",
}
REPORTED = {
    "lora": "LoRA",
    "lora-per-task": "one LoRA a task, rank 8",
    "lora-per-task-small": "one LoRA a task, EPT's parameters",
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
    (line,) = re.findall(rf"^\| \**{re.escape(title)}.*\|$", text, flags=re.MULTILINE)
    return [cell.strip().strip("*") for cell in line.split("|")[1:-1]]


def _with_error(mean: float, error: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f} ± {error:.3f}"


def _difference(method: str) -> str:
    """EPT minus a system, as the recorded report has it."""
    if method == "ept":
        return ""
    title = re.escape(REPORTED.get(method, TITLES[method]))
    (found,) = re.findall(rf"^- {title}: EPT (\S+) \(± (\S+) over \d+ seeds\)", REPORT, flags=re.MULTILINE)
    return " ± ".join(found)


@pytest.mark.parametrize("method", SUMMARY["methods"])
def test_the_systems(method: str) -> None:
    found, title = SUMMARY["methods"][method], TITLES[method]
    trained, score = f"{found['parameters'] / TASKS:,.0f}", _with_error(found["mean"], found["standard_error"])
    assert _row(ROOT / "README.md", "Results", title)[1:] == [trained, score, _difference(method)]
    _, rate, *rest, seeds = _row(ROOT / "docs" / "results.md", "Seven systems on six GLUE tasks", title)
    assert rest == [trained, score, _difference(method)]
    assert (float(rate), int(seeds)) == (found["lr"], found["seeds"])


def test_the_picture_is_drawn_from_the_records() -> None:
    """``python docs/images/results.py`` draws it again."""
    summary = hashlib.sha256((RECORDED / "quality" / "summary.json").read_bytes()).hexdigest()
    with Image.open(ROOT / "docs" / "images" / "results.png") as picture:
        assert picture.info["Source"] == summary


@pytest.mark.parametrize("name", SUMMARY["ablations"])
def test_the_ablations(name: str) -> None:
    found = SUMMARY["ablations"][name]
    _, score, difference, published = _row(ROOT / "docs" / "results.md", "Ablations", ABLATIONS[name])
    recorded = re.findall(rf"^\| {name} .*\| (\S+) \(± (\S+) over \d+ seeds\) \| (\S+) \|$", REPORT, flags=re.MULTILINE)
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


# ---- tasks and serving


def _recorded(name: str) -> dict:
    return json.loads((RECORDED / f"{name}.json").read_text())


def test_samples_without_a_task_id() -> None:
    page, found = ROOT / "docs" / "tasks.md", _recorded("auto_tasks")
    text = page.read_text()

    def cells(title: str) -> list[str]:
        (line,) = re.findall(rf"^\| \**{re.escape(title)}\** \|.*\|$", text, flags=re.MULTILINE)
        return [cell.strip().strip("*") for cell in line.split("|")[2:-1]]

    ways = {
        "prototypes, centred and scaled (shipped)": "prototypes, standardised (shipped)",
        "prototypes, centred": "prototypes, centred",
        "prototypes as they are": "prototypes",
        "task embeddings": "task embeddings",
        "task embeddings, centred": "task embeddings, centred",
    }
    for title, key in ways.items():
        way = found["telling"][key]
        assert cells(title) == [f"{way['right']:.3f}", f"{way['weight of the true task']:.2f}"], title
    for title, key in {"true id": "true id", '`"auto"`': "auto", "random id": "random id"}.items():
        assert cells(title) == [f"{scores[key]:.3f}" for scores in found["scores"].values()], title
    left_out = {
        "nothing: the frozen base": "none",
        "random id of the others": "random id of the others",
        '`"auto"` over the others': "auto over the others",
        "its own id, by an adapter of all four": "trained",
    }
    for title, key in left_out.items():
        scores = [task[key] for task in found["leave_one_out"].values()]
        assert cells(title) == [f"{score:.3f}" for score in (*scores, statistics.mean(scores))], title


def test_an_added_task() -> None:
    found, text = _recorded("add_task"), (ROOT / "docs" / "tasks.md").read_text()
    added = found["added"]
    titles = {
        "a new head": "head only",
        "embedding and head": "embedding and head",
        "embedding, head and two experts of size 8 a layer": "new kernels",
        "nothing more: trained with the others from the start (200 steps of all four)": "together",
    }
    for title, key in titles.items():
        number = added["trained parameters"].get(key)
        count = f" {number:,}" if number else ""
        assert f"| {title} | {added['scores'][key]:.2f} |{count} |" in text, title
    assert found["old tasks"]["bit-equal"] is True


def test_mixed_batches() -> None:
    page = ROOT / "docs" / "serving.md"
    titles = {"model": "MiniLM, 64 x 16 tokens", "layer": "768 x 768 layer", "small": "384 x 384 layer"}
    for case, title in titles.items():
        candidates = _recorded("serving")["cases"][case]["candidates"]
        columns = [candidates.get(name) for name in ("2 tasks", "8 tasks", "64 tasks", "merged", "frozen")]
        ratios = ["" if column is None else f"{column['over_one_task']:.2f}" for column in columns]
        assert _row(page, "A batch of many tasks", title)[1:] == ratios, title
    model = _recorded("serving")["cases"]["model"]["candidates"]
    assert f"takes {model['token']['over_one_task']:.2f} times" in page.read_text()
