"""The quality benchmark: what it runs, that it goes on where it was, and that its report says what was measured."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quality
from quality_plan import ABLATIONS, METHODS, SEPARATE, Bench, Run, best_rate, candidates, finals
from quality_report import (
    FULL,
    PUBLISHED,
    Results,
    adapter_parameters,
    beside_the_constant,
    power,
    score,
    verdicts,
    write_report,
)
from quality_run import RunLog, digest, hold_out
from rich.console import Console
from training_run import mean_and_error

from ept.data import TaskData
from ept.training.options import SYSTEMS

BENCH = Bench(
    suite="embedded",
    data="nowhere",
    tasks=None,
    model="tiny",
    methods=("lora", "ept"),
    ablations=(),
    steps=2,
    selection_steps=1,
    seeds=2,
    rates=(1.0, 2.0),
    widen=False,
    batch_size=4,
    max_length=16,
    bf16=False,
    eval_limit=8,
)


def record(mean: float, parameters: int = 100) -> dict:
    return {
        "scores": {"a": mean, "b": mean},
        "metrics": {"a": "accuracy", "b": "pearson"},
        "test": {},
        "baseline": {"a": 0.5, "b": 0.0},
        "mean": mean,
        "rows": {"a": [10, 5], "b": [10, 5]},
        "parameters": {"adapter": parameters, "other": 7},
        "expert_use": {"a": {"2": 0.25, "4": 0.75}, "b": {"2": 1.0, "4": 0.0}},
        "seconds": 1.0,
        "device": "cpu",
        "versions": {"torch": "2"},
    }


def finished(tmp_path: Path, bench: Bench = BENCH) -> RunLog:
    """A log in which the second rate is the best one, EPT is 0.1 ahead, and every seed adds 0.02."""
    log = RunLog(tmp_path / "runs.jsonl", bench)
    for method in bench.methods:
        for place, run in enumerate(candidates(bench, method, log)):
            log.add(run, record(0.3 + 0.1 * place))
    rates = {method: best_rate(bench, method, log) for method in bench.methods}
    for seed in range(bench.seeds):
        for run in finals(bench, rates, seed):
            log.add(run, record(0.5 + 0.02 * seed + 0.1 * (run.method == "ept"), 50 if run.method == "ept" else 100))
    return log


def test_every_system_is_in_the_comparison() -> None:
    assert set(METHODS) == {*SYSTEMS, *SEPARATE}


def test_the_plan_selects_a_rate_and_then_runs_every_seed(tmp_path: Path) -> None:
    log = finished(tmp_path)
    default = SYSTEMS["ept"].learning_rate
    assert [run.lr for run in candidates(BENCH, "ept", log)] == [default, 2 * default]
    assert best_rate(BENCH, "ept", log) == 2 * default
    with_ablations = replace(BENCH, ablations=ABLATIONS)
    runs = finals(with_ablations, {"lora": 1.0, "ept": 2.0}, seed=1)
    assert [run.ablation for run in runs] == [None, None, *ABLATIONS]
    assert {run.lr for run in runs if run.method == "ept"} == {2.0}


def test_the_grid_widens_where_its_largest_rate_is_the_best(tmp_path: Path) -> None:
    bench, default = replace(BENCH, widen=True, methods=("lora",)), SYSTEMS["lora"].learning_rate
    log = RunLog(tmp_path / "runs.jsonl", bench)
    grid = candidates(bench, "lora", log)
    assert [run.lr for run in grid] == [default, 2 * default]
    log.add(grid[0], record(0.4))
    log.add(grid[1], record(0.5))
    *_, wider = candidates(bench, "lora", log)
    assert wider.lr == 4 * default
    assert [run.lr for run in candidates(BENCH, "lora", log)] == [default, 2 * default]
    log.add(wider, record(0.45))
    assert best_rate(bench, "lora", log) == 2 * default
    log.add(finals(bench, {"lora": 2 * default}, 0)[0], record(0.5))
    write_report(tmp_path / "out", bench, log, "")
    table = (tmp_path / "out" / "report.md").read_text().partition("## Learning rates")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}
    assert f"{4 * default:g}: 0.450" in rows[-1]


def test_a_grid_whose_best_rate_is_inside_does_not_widen(tmp_path: Path) -> None:
    bench = replace(BENCH, widen=True)
    log = RunLog(tmp_path / "runs.jsonl", bench)
    for mean, run in zip((0.5, 0.4), candidates(bench, "lora", log), strict=True):
        log.add(run, record(mean))
    assert len(candidates(bench, "lora", log)) == 2


def test_equal_rates_give_the_lower_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl", BENCH)
    for run in candidates(BENCH, "lora", log):
        log.add(run, record(0.4))
    assert best_rate(BENCH, "lora", log) == SYSTEMS["lora"].learning_rate


def test_the_log_survives_a_crash_and_knows_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    log = finished(tmp_path)
    first, second = candidates(BENCH, "lora", log)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # killed while it wrote the third
    log = RunLog(path, BENCH)
    assert first in log
    assert second in log
    assert candidates(BENCH, "ept", log)[0] not in log
    log.add(candidates(BENCH, "ept", log)[0], record(0.9))
    assert RunLog(path, BENCH)[candidates(BENCH, "ept", log)[0]]["mean"] == 0.9
    assert first not in RunLog(path, replace(BENCH, batch_size=8))
    assert first in RunLog(path, replace(BENCH, data="moved", seeds=5))


def test_held_out_rows_come_from_training_and_leave_it(tasks: list[TaskData]) -> None:
    task = tasks[1]
    held = hold_out(task)
    assert held.test is None
    assert len(held.validation) == len(task.train) // 10
    assert len(held.train) + len(held.validation) == len(task.train)
    assert sorted([*held.train["text"], *held.validation["text"]]) == sorted(task.train["text"])
    assert hold_out(task).validation["text"] == held.validation["text"]


def test_the_report_shows_means_errors_and_the_comparison(tmp_path: Path) -> None:
    log = finished(tmp_path)
    paths = write_report(tmp_path / "out", BENCH, log, "python benchmarks/quality.py")
    assert {path.name for path in paths} == {"report.md", "summary.json", "parameters.png", "experts.png"}
    text = (tmp_path / "out" / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| EPT |"))
    assert row.split(" | ")[1:] == ["0.003", "25", "0.610 ± 0.010", "0.610 ± 0.010", "0.610 ± 0.010", "2 |"]
    assert verdicts(Results(BENCH, log)) == ["- LoRA: EPT +0.100 (± 0.000 over 2 seeds) at 0.50 times its parameters."]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["methods"]["lora"]["mean"] == pytest.approx(0.51)
    assert summary["methods"]["lora"]["standard_error"] == pytest.approx(0.01)


def test_the_report_sets_the_ablations_beside_the_papers(tmp_path: Path) -> None:
    bench = replace(BENCH, ablations=ABLATIONS)
    log = finished(tmp_path)
    rate = 2 * SYSTEMS["ept"].learning_rate  # the full method has .60 and .62
    for name, scores in {"all-8": (0.55, 0.61), "no-top-k": (0.63, 0.63), "all-2": (0.5, None)}.items():
        for seed, mean in enumerate(scores):
            if mean is not None:
                log.add(Run("final", "ept", rate, seed, bench.steps, name), record(mean))
    log.add(Run("final", "ept", rate, 1, bench.steps, "zero-init-seed"), record(0.9))  # its seed 0 has not run
    write_report(tmp_path / "out", bench, log, "")
    lines = (tmp_path / "out" / "report.md").read_text().split("## Ablations")[1].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][2:6]
    assert [(row[0], *row[-3:]) for row in rows] == [
        ("no-top-k", "2", "+0.020 (± 0.010 over 2 seeds)", "-0.010"),
        (FULL, "2", "", ""),
        ("all-8", "2", "-0.030 (± 0.020 over 2 seeds)", "-0.009"),
        ("all-2", "1", "-0.100 (one seed)", "-0.012"),
    ]
    assert set(PUBLISHED) == {FULL, *ABLATIONS}


def test_an_unfinished_benchmark_reports_what_is_there(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl", BENCH)
    assert write_report(tmp_path / "out", BENCH, log, "") == []
    assert not (tmp_path / "out").exists()
    for run in candidates(BENCH, "lora", log):
        log.add(run, record(0.4))
    log.add(Run("final", "lora", SYSTEMS["lora"].learning_rate, 0, BENCH.steps), record(0.4))
    write_report(tmp_path / "out", BENCH, log, "")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| LoRA |" in text
    assert "| EPT |" not in text


def test_one_value_has_no_error() -> None:
    mean, error = mean_and_error([0.5])
    assert mean == 0.5
    assert error != error


def test_it_trains_scores_and_goes_on_where_it_was(
    tmp_path: Path, tasks: list[TaskData], toys: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    toys.make_base("encoder").save_pretrained(model)
    toys.make_tokenizer("encoder").save_pretrained(model)
    methods = ("lora", *SEPARATE, "ept")
    bench = replace(BENCH, model=str(model), seeds=1, ablations=ABLATIONS, methods=methods, steps=4, curve_steps=2)
    log = RunLog(tmp_path / "runs.jsonl", bench)
    quality.run_all(bench, tasks[:2], log, Console(quiet=True))
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 4 * (2 + 1) + len(ABLATIONS)
    found = json.loads(lines[-1])["record"]
    assert found["rows"] == {"polarity": [60, 20], "topic": [200, 20]}
    assert set(found["scores"]) == {"polarity", "topic"}
    shared, separate, small, ept = (json.loads(line)["record"] for line in lines[8:12])
    for part in (shared, separate, small, ept):
        assert set(part["curve"]) == {"2"}
        assert set(part["curve"]["2"]) == {"polarity", "topic"}
        for task, answers in part["answers"].items():
            assert score(np.array(answers), part["metrics"][task]) == pytest.approx(part["scores"][task], abs=1e-6)
    sizes = [adapter_parameters(part) for part in (shared, separate, small, ept)]
    assert sizes[1] == 2 * sizes[0]
    assert 0 < sizes[2] <= sizes[3]
    monkeypatch.setattr(quality, "execute", lambda *_: pytest.fail("a finished run ran again"))
    quality.run_all(bench, tasks[:2], RunLog(tmp_path / "runs.jsonl", bench), Console(quiet=True))
    assert write_report(tmp_path / "out", bench, log, "")
    assert "## Score over steps" in (tmp_path / "out" / "report.md").read_text()


def test_rows_that_both_answer_alike_make_no_error(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl", BENCH)
    random = np.random.default_rng(0)
    labels = random.integers(2, size=400)
    right = {"lora": labels ^ (random.random(400) < 0.3), "ept": labels ^ (random.random(400) < 0.3)}
    for method in BENCH.methods:
        for run in candidates(BENCH, method, log):
            log.add(run, record(0.1))
        rate = best_rate(BENCH, method, log)
        for seed in range(2):
            answers = {name: [right[method].tolist(), labels.tolist()] for name in "ab"}
            log.add(Run("final", method, rate, seed, BENCH.steps), record(0.5 + 0.01 * seed) | {"answers": answers})
    # About the error of a difference of two shares of right answers, .7 each, over 400 rows, halved by the second task.
    line = power(Results(BENCH, log), "lora")
    assert "seeds 0.000" in line
    rows = float(re.search(r"validation rows ([\d.]+)", line)[1])
    assert 0.3 * (2 * 0.7 * 0.3 / 400) ** 0.5 < rows < 1.5 * (2 * 0.7 * 0.3 / 400) ** 0.5


def test_a_rate_that_is_given_is_not_chosen(tmp_path: Path) -> None:
    bench = replace(BENCH, rate=0.5)
    log = RunLog(tmp_path / "runs.jsonl", bench, "data")
    assert candidates(bench, "ept", log) == []
    (run, _) = finals(bench, {method: best_rate(bench, method, log) for method in ("ept", "lora")}, 0)
    assert run.lr == 0.5
    log.add(run, record(0.4))
    write_report(tmp_path / "out", bench, log, "")
    assert "Learning rates" not in (tmp_path / "out" / "report.md").read_text()


def test_runs_of_other_data_are_not_these(tmp_path: Path, tasks: list[TaskData]) -> None:
    path, run = tmp_path / "runs.jsonl", Run("final", "ept", 0.1, 0, 2)
    others = [replace(tasks[0], train=tasks[0].train.select(range(59))), *tasks[1:]]
    assert digest(tasks) == digest(list(tasks)) != digest(others)
    RunLog(path, BENCH, digest(tasks)).add(run, record(0.4))
    assert run in RunLog(path, BENCH, digest(tasks))
    assert run not in RunLog(path, BENCH, digest(others))
    RunLog(path, BENCH, digest(others)).add(run, record(0.6))
    assert RunLog(path, BENCH)[run]["mean"] == 0.6
    assert RunLog(path, BENCH, digest(tasks))[run]["mean"] == 0.4


def test_who_does_not_beat_the_constant_answer_is_named(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs.jsonl", BENCH)
    for method, scores in {"lora": {"a": 0.6, "b": -0.1}, "ept": {"a": 0.5, "b": -0.2}}.items():
        for run in candidates(BENCH, method, log):
            log.add(run, record(0.1))
        rate = best_rate(BENCH, method, log)
        log.add(Run("final", method, rate, 0, BENCH.steps), record(0.3) | {"scores": scores})
    assert beside_the_constant(Results(BENCH, log)) == (
        "Mean above the constant answer: LoRA on a; every other method on the same, "
        "but for EPT on a (0.500 against 0.500)."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "glue"], "--data is missing: the suite 'glue' has no data of its own"),
        (["--suite", "embedded", "--methods", "ept,magic"], "--methods: unknown magic; allowed: lora"),
        (["--suite", "embedded", "--ablations", "no-magic"], "--ablations: unknown no-magic; allowed: zero-init-seed"),
        (["--suite", "embedded", "--curve-steps", "0"], "--curve-steps: must be at least 1, got 0"),
        (["--suite", "embedded", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["--suite", "embedded", "--rate", "-1"], "--rate: must be a positive number, got -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser: argparse.ArgumentParser = quality.build_parser()
    with pytest.raises(SystemExit):
        quality.bench_of(parser, parser.parse_args(arguments))
    assert message in capsys.readouterr().err
