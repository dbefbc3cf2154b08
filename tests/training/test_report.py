"""Files, table and pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ept import plots
from ept.data import TaskData
from ept.files import WriteError, read_json, write_atomically, write_json
from ept.training.report import results_table, write_metrics

HISTORY = [
    {"step": 10, "loss": 1.1, "task_loss": 1.0, "contrastive_loss": 1.0},
    {"step": 10, "eval_mean": 0.5},
    {"step": 20, "loss": 0.9, "task_loss": 0.85, "contrastive_loss": 0.5},
    {"step": 20, "eval_mean": 0.6},
]


def _results(value: float) -> dict[str, dict[str, float]]:
    return {
        "polarity": {"accuracy": value, "f1": value / 2},
        "topic": {"accuracy": value},
        "degree": {"pearson": value, "spearman": value},
    }


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "deep" / "a.json", {"old": 1})

    def fail(file: Path) -> None:
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert read_json(path) == {"old": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_file_takes_no_folders_place(tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    (tmp_path / "out.json" / "thesis.txt").write_text("years of work")
    with pytest.raises(WriteError, match=r"out\.json': .*a folder is there, and a file is to be written"):
        write_json(tmp_path / "out.json", {})
    assert [path.name for path in tmp_path.rglob("*")] == ["out.json", "thesis.txt"]


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    disk, run = tmp_path / "disk", tmp_path / "run"
    (disk / "adapter").mkdir(parents=True)
    run.mkdir()
    (run / "adapter").symlink_to(disk / "adapter")
    (run / "notes.json").symlink_to(disk / "notes.json")  # of nothing yet
    for name in ("a", "b"):

        def fill(folder: Path, name: str = name) -> None:
            folder.mkdir()
            (folder / name).write_text(name)

        assert write_atomically(run / "adapter", fill) == run / "adapter"
        write_json(run / "notes.json", name)
    assert (run / "adapter").is_symlink()
    assert (run / "notes.json").is_symlink()
    assert sorted(path.name for path in disk.rglob("*")) == ["adapter", "b", "notes.json"]
    assert read_json(disk / "notes.json") == "b"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def write(name: str):
        def fill(folder: Path) -> None:
            folder.mkdir()
            (folder / name).write_text(name)

        return fill

    for name in ("a", "b"):
        write_atomically(tmp_path / "out", write(name))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_is_strict(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"nan": float("nan"), "tuple": (1, float("inf"))})
    assert json.loads(path.read_text()) == {"nan": None, "tuple": [1, None]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json' is not valid JSON"):
        read_json(tmp_path / "b.json")


def test_table_shows_every_metric_and_the_mean(tasks: list[TaskData]) -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(results_table([task.spec for task in tasks], _results(0.4), _results(0.75), _results(0.5)))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["polarity", "accuracy", "0.500", "0.400", "0.750", "+0.250"] in lines
    assert ["f1", "0.250", "0.200", "0.375", "+0.125"] in lines
    assert ["mean", "first", "metric", "of", "each", "0.500", "0.400", "0.750", "+0.250"] in lines


def test_table_counts_unparseable_answers(tasks: list[TaskData]) -> None:
    before, after = (
        {**_results(value), "topic": {"accuracy": value, "unparseable": n}} for value, n in ((0.1, 9), (0.2, 3))
    )
    console = Console(width=100, file=io.StringIO())
    console.print(results_table([task.spec for task in tasks], before, after, _results(0.5)))
    assert ["unparseable", "answers", "9", "3"] in [line.split() for line in console.file.getvalue().splitlines()]


def test_metrics_file(tmp_path: Path, tasks: list[TaskData]) -> None:
    path = write_metrics(
        tmp_path / "metrics.json",
        [task.spec for task in tasks],
        before=_results(0.4),
        after=_results(0.75),
        baseline=_results(0.5),
        settings={"lr": 1.0},
        device="cpu",
        parameters={"seed": 3},
        history=HISTORY,
    )
    found = read_json(path)
    assert found["mean"] == pytest.approx({"baseline": 0.5, "before": 0.4, "after": 0.75})
    assert found["tasks"]["degree"]["headline"] == "pearson"
    assert found["tasks"]["polarity"]["after"] == {"accuracy": 0.75, "f1": 0.375}
    assert found["history"] == HISTORY
    assert (found["settings"], found["parameters"], found["device"]) == ({"lr": 1.0}, {"seed": 3}, "cpu")


def test_expert_use_adds_up_gates_by_scale_and_group(tmp_path: Path) -> None:
    experts = torch.tensor([[0, 1], [2, 0]])
    routing = {
        "encoder.layer.0.attention.query": (experts, torch.tensor([[0.75, 0.25], [0.5, 0.5]])),
        "encoder.layer.1.attention.query": (experts, torch.tensor([[0.25, 0.75], [1.0, 0.0]])),
        "encoder.layer.1.output": (experts, torch.tensor([[1.0, 0.0], [0.0, 1.0]])),
    }
    groups = plots._layer_groups(routing, (2, 2, 4))
    assert list(groups) == ["attention.query", "output"]
    np.testing.assert_allclose(groups["attention.query"], [[1.0, 0.0], [0.25, 0.75]])
    np.testing.assert_allclose(groups["output"], [[1.0, 0.0], [1.0, 0.0]])
    path = plots.expert_use(routing, (2, 2, 4), ["a", "b"], tmp_path / "use.png")
    with Image.open(path) as picture:
        picture.verify()


def test_loss_curves_and_task_map_are_pictures(tmp_path: Path) -> None:
    for path in (
        plots.loss_curves(HISTORY, tmp_path / "loss.png"),
        plots.loss_curves(HISTORY[:1], tmp_path / "short.png"),
        plots.task_map(torch.randn(5, 8), list("abcde"), tmp_path / "map.png"),
        plots.task_map(torch.zeros(2, 8), ["a", "b"], tmp_path / "same.png"),
    ):
        with Image.open(path) as picture:
            picture.verify()


def test_pictures_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no entry with a training loss"):
        plots.loss_curves([{"step": 1, "eval_mean": 0.5}], tmp_path / "a.png")
    with pytest.raises(ValueError, match="embeddings of 1 tasks"):
        plots.task_map(torch.zeros(1, 8), ["a"], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
