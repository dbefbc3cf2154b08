"""The static check of the Triton kernels: a sample of what ships passes, and what must not ship is refused.

``make static`` compiles everything. The check runs in processes of its own: tests elsewhere interpret kernels, and one
process does not mix that with compiling.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("compiling kernels needs the package triton (pip install triton)", allow_module_level=True)

REPOSITORY = Path(__file__).parents[2]
REPORT = REPOSITORY / "benchmarks" / "static_report.py"


def run(script: Path, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` as a user would, compiling anew."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, script, *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("sm_80", "bf16"), ("sm_86", "fp32"), ("sm_90", "fp16"), ("sm_100", "bf16"), ("gfx942", "fp32")],
)
def test_a_sample_of_what_ships_passes(target: str, dtype: str, tmp_path: Path) -> None:
    report = tmp_path / "report.csv"
    chosen = ["--target", target, "--dtype", dtype, "--case", "default r=8"]  # other pyramids compile for minutes
    words = [*chosen, "--sample", "3", "--seed", "3", "--jobs", "1"]
    done = run(REPORT, tmp_path / "cache", *words, "--output", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kernels compiled, 0 violations" in done.stdout
    assert len(report.read_text().splitlines()) == 4


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """Rows are known again by source, specialisation and target; what they hold is judged anew."""
    report = tmp_path / "report.csv"
    chosen = ["--target", "sm_80", "--dtype", "bf16", "--kernel", "reduce_kernel", "--case", "default r=8, 4096x4096"]
    words = [*chosen, "--jobs", "1", "--output", str(report), "--resume"]
    assert run(REPORT, tmp_path / "cache", *words).returncode == 0
    whole = report.read_text().splitlines()
    report.write_text("\n".join(whole[:-1]) + "\n")
    table = run(REPORT, tmp_path / "cache", *words).stdout
    assert f"compiling 1, {len(whole) - 2} known already" in table
    assert f"{len(whole) - 1} kernels compiled, 0 violations" in table
    again = report.read_text().splitlines()
    assert [line.rsplit(",", 1)[0] for line in again] == [line.rsplit(",", 1)[0] for line in whole], "but for seconds"
    report.write_text("\n".join(whole[1:]))
    assert "must have the columns" in run(REPORT, tmp_path / "cache", *words).stderr


def test_coverage_is_one_launch_of_each_configuration(tmp_path: Path) -> None:
    """The same tiles stand once a kernel, whatever the pyramids and batches; each again once for each dtype."""
    report = tmp_path / "report.csv"
    chosen = ["--target", "sm_80", "--dtype", "bf16", "--dtype", "fp16", "--kernel", "reduce_kernel", "--jobs", "1"]
    done = run(REPORT, tmp_path / "cache", *chosen, "--cover", "configurations", "--output", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    with report.open(newline="") as file:
        rows = [(row["kernel"], row["tiles"], row["dtype"]) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows))
    assert {row[2] for row in rows} == {"bf16", "fp16"}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    done = run(Path(__file__).with_name("planted.py"), tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["innocent", "innocent on AMD"])
def test_sound_kernels_pass(name: str, verdicts: dict[str, list[str]]) -> None:
    assert verdicts[name] == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no dot", "no matrix instruction"),
        ("narrow loads", "narrow loads"),
        ("narrow loads on AMD", "narrow loads"),
        ("unlisted", "missing from EXPECTATIONS"),
        ("refused", "does not compile"),
        ("spill", "spills"),
        ("shared memory", "bytes of shared memory"),
    ],
)
def test_planted_violations_are_caught(name: str, reason: str, verdicts: dict[str, list[str]]) -> None:
    assert any(reason in line for line in verdicts[name]), verdicts[name]


@pytest.mark.parametrize("base", ["fused", "single", "split"])
def test_batches_share_compiled_kernels(base: str, tmp_path: Path) -> None:
    """Over 352 batches, a kernel is compiled once for each choice of tiles and switches, whatever the numbers."""
    done = run(Path(__file__).with_name("specialisations.py"), tmp_path, base)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert {"shrink_kernel, backward", "factor_grad_kernel, backward", "reduce_kernel, backward"} <= set(counts)
    assert {"fold_kernel, forward", "logits_grad_kernel, backward", "fold_grad_kernel, backward"} <= set(counts)
    for which, (compiled, needed) in counts.items():
        assert compiled == needed <= 12, which


def test_interpreting_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, REPORT, "--target", "sm_80", "--dtype", "bf16", "--sample", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sample", "0"], "--sample must be at least 1"),
        (["--output", "x.txt"], "--output must end"),
        (["--output", "x.md", "--resume"], "--resume needs an --output that ends in .csv"),
    ],
)
def test_bad_arguments_are_named(words: list[str], complaint: str, tmp_path: Path) -> None:
    done = run(REPORT, tmp_path, *words)
    assert done.returncode == 2
    assert complaint in done.stderr
