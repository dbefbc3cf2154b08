"""``benchmarks/gpu.py``: every stage runs (on a CPU, in small), and costs nothing but itself whatever it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import gpu
import pytest
import torch
from gpu_stages import STAGES, Stage, tune
from gpu_stages.bench import Bench
from gpu_stages.table import PROVENANCE, read_rows, summary
from gpu_stages.tensors import build
from harness import Timed

from ept_kernels import reference
from ept_kernels.doctor import relative_errors

SCRIPT = Path(gpu.__file__)
BEGIN = "import sys; sys.stdin.readline(); "


def rows_of(stages: list[Stage], programs: dict[str, str], out: Path, minutes: float) -> list[dict[str, object]]:
    commands = lambda stage: [sys.executable, "-c", BEGIN + programs[stage.name]]  # noqa: E731
    gpu.run_stages(stages, commands, out, minutes, {"run": "test"})
    return read_rows(out / gpu.FILE)


def test_a_dry_run_of_every_stage(tmp_path: Path) -> None:
    """What a GPU machine would do, on a CPU: rows with their origin, nothing failed, a table that says what it is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--dry", "--minutes", "30", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    rows = read_rows(tmp_path / gpu.FILE)
    assert not [row for row in rows if row.get("error") or row.get("right") is False]
    for stage in STAGES:
        results = [row for row in rows if row["stage"] == stage.name]
        assert [row["status"] for row in results if row.get("what") == "stage"] == ["ok"], stage.name
        assert len(results) > 1, stage.name
    for row in rows:
        assert row["dry"] and "mean nothing" in row["times"] and row["run"]
        assert set(PROVENANCE) <= set(row)
    assert (tmp_path / "summary.md").read_text() in done.stdout
    assert "no time below means anything" in done.stdout
    for way in ("linear", "lora", "addmm", "ept:torch"):
        timed = [row for row in rows if row["stage"] == "layers" and row.get("way") == way and "us" in row]
        assert {(row["pass"], row["how"]) for row in timed} == {
            (which, how) for which in ("forward", "forward+backward") for how in ("eager", "graph")
        }


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--minutes", "30", "--stages", "machine", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    (row,) = read_rows(tmp_path / gpu.FILE)
    assert "no GPU that torch can use; --dry" in row["error"]


def test_a_hang_is_ended_with_all_that_it_started_and_the_rest_runs(tmp_path: Path) -> None:
    """Even where the stage ignores signals and has a child that holds its output open."""
    grandchild = tmp_path / "pid"
    hang = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"p = subprocess.Popen(['sleep', '1000']); open({str(grandchild)!r}, 'w').write(str(p.pid)); time.sleep(1000)"
    )
    stages = [Stage("hangs", 1, "hangs"), Stage("after", 2, "runs")]
    rows = rows_of(stages, {"hangs": hang, "after": "pass"}, tmp_path, (gpu.RESERVE + 24) / 60)
    assert [(row["stage"], row["status"]) for row in rows] == [("hangs", "stopped"), ("after", "ok")]
    assert rows[0]["seconds"] < rows[0]["limit"] + 3
    state = Path("/proc", grandchild.read_text(), "stat")  # gone, or dead and not yet collected by its parent
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_crash_costs_its_stage_alone(tmp_path: Path) -> None:
    """At import, before it is told to begin, or later; what it said last is kept, and so are the rows it wrote."""
    written = f'open({str(tmp_path / gpu.FILE)!r}, \'a\').write(\'{{"stage": "dies", "us": 1}}\\n{{"half\'); '
    stages = [Stage("dies", 1, ""), Stage("killed", 1, ""), Stage("lives", 1, "")]
    programs = {"dies": written + "raise SystemError('lost')", "killed": "import os; os.abort()", "lives": "pass"}
    rows = rows_of(stages, programs, tmp_path, (gpu.RESERVE + 60) / 60)
    status = {row["stage"]: row for row in rows if row.get("what") == "stage"}
    assert {name: row["status"] for name, row in status.items()} == {
        "dies": "failed (1)",
        "killed": "failed (-6)",
        "lives": "ok",
    }
    assert "SystemError: lost" in status["dies"]["error"]
    assert {"stage": "dies", "us": 1} in rows


def test_the_budget_is_kept(tmp_path: Path) -> None:
    """By stages that all hang, one of them beside the others; those that have no time left are named."""
    stages = [Stage("beside", 9, "", beside=True), *(Stage(name, 1, "") for name in "abc")]
    seconds = gpu.RESERVE + gpu.LEAST + 4
    start = time.monotonic()
    rows = rows_of(stages, dict.fromkeys(["beside", *"abc"], "import time; time.sleep(1000)"), tmp_path, seconds / 60)
    assert time.monotonic() - start < seconds + 2
    status = {row["stage"]: row["status"] for row in rows}
    assert status == {"a": "stopped", "beside": "stopped", "b": "not started", "c": "not started"}


def test_time_that_is_left_goes_to_later_stages() -> None:
    stages = [Stage("a", 10, ""), Stage("beside", 10, "", beside=True), Stage("b", 30, "")]
    assert gpu.allowed(stages[0], stages[1:], 80.0) == 20.0
    assert gpu.allowed(stages[2], [], 77.0) == 77.0


def test_at_eight_minutes_every_stage_gets_what_it_is_promised() -> None:
    left = 8 * 60 - gpu.RESERVE
    for place, stage in enumerate(STAGES):
        if not stage.beside:
            limit = gpu.allowed(stage, STAGES[place + 1 :], left)
            assert limit >= stage.seconds
            left -= limit


@pytest.mark.parametrize("arguments", [["--stages", "machine,abacus"], ["--minutes", "0"], ["--minutes", "nan"]])
def test_bad_arguments(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert ("abacus" in said and "layers" in said) or "minutes must be above 0" in said


def test_the_layer_that_is_judged_is_the_reference() -> None:
    layer = build(torch.device("cpu"), torch.float64, 50, 37, 4, 3, groups=3)
    layer = replace(layer, A=layer.A.double(), B=layer.B.double(), folded=layer.folded.double())

    def by_reference(x, A, B, folded):
        return reference.pyramid_linear(x, layer.weight, None, A, B, folded, layer.groups, layer.geometry)

    found = layer.evaluate(layer.definition, layer.leaves())
    assert max(relative_errors(found, layer.evaluate(by_reference, layer.leaves()))) < 1e-12


def test_what_does_not_compile_in_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for processes, and a call for a compilation: fine, refused, or too slow."""
    quick, refused, slow = ({"BLOCK_T": 128, "BLOCK_O": size} for size in (256, 128, 64))
    few = {"BLOCK_T": 16, "BLOCK_O": 64}

    def compile_one(configuration: dict[str, int], *_: object) -> None:
        if configuration == refused:
            raise RuntimeError("out of shared memory")
        time.sleep(20 if configuration == slow else 0)

    monkeypatch.setattr(tune, "_compile", compile_one)
    monkeypatch.setattr(tune, "shipped", lambda rows: [quick] if rows > tune.FEW else [few])
    monkeypatch.setattr(tune, "grid", lambda rows: [slow, refused, quick] if rows > tune.FEW else [few])
    monkeypatch.setattr(tune.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=lambda _: ThreadPool(3)))
    bench = Bench("tune", torch.device("cpu"), False, time.monotonic() + 4, tmp_path / gpu.FILE, {})
    assert tune._compiled(bench) == {True: [quick], False: [few]}
    said = {row["config"]["BLOCK_O"]: row.get("skipped") or row.get("error") for row in read_rows(bench.path)}
    assert said == {128: "RuntimeError: out of shared memory", 64: "not compiled in time"}


def test_an_attempt_that_fails_is_a_row(tmp_path: Path) -> None:
    bench = Bench("layers", torch.device("cpu"), True, time.monotonic() + 9, tmp_path / gpu.FILE, {"commit": "abc"})
    with bench.attempt(what="layer", way="lora"):
        raise ImportError("no peft")
    bench.emit(what="layer", way="ept")
    first, second = read_rows(bench.path)
    assert first == {**first, "stage": "layers", "way": "lora", "error": "ImportError: no peft", "commit": "abc"}
    assert second["way"] == "ept"


def test_calls_that_take_turns(tmp_path: Path) -> None:
    """A row each, over the baseline; a call of several copies counts as one of them."""
    bench = Bench("kernels", torch.device("cpu"), False, time.monotonic() + 60, tmp_path / gpu.FILE, {})
    copies: list[int] = []
    calls = {"one": Timed(lambda: time.sleep(0.004)), "four": Timed(bench.rotated(copies.append))}
    bench.compare(calls, key="call", baseline="one", rotated=True, rounds=3, tokens=8)
    rows = {row["call"]: row for row in read_rows(bench.path)}
    assert set(copies) == set(range(bench.copies)) and len(copies) % bench.copies == 0
    assert rows["one"]["ratio"] == 1.0 and rows["four"]["ratio"] > 0
    assert rows["one"]["us"] >= 4000 / bench.copies
    assert rows["one"]["tokens_per_s"] == pytest.approx(8e6 / rows["one"]["us"])
    assert rows["one"]["host_us"] >= 4000 / bench.copies


def test_the_table_names_what_was_wrong() -> None:
    gate = {"stage": "gate", "what": "gate", "dtype": "bf16", "layer": "t5-base q"}
    text = summary(
        [
            {**gate, "way": "cuda", "right": False, "error": "error of grad A is 1.0e+00", "device": "a GPU"},
            {**gate, "way": "torch", "right": True, "error": None},
            {"stage": "layers", "way": "lora", "error": "ImportError: no peft"},
        ]
    )
    assert "1 of 2 right" in text
    assert "| gate | cuda | t5-base q | bf16 | error of grad A is 1.0e+00 |" in text
    assert "ImportError: no peft" in text and "a GPU" in text
    assert json.dumps(text).isascii()
