"""The static check of the Triton kernels: what ships passes with two versions of Triton, what must not ship is refused.

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
REPORT = Path(__file__).with_name("report.py")
#: What torch 2.10 and 2.11 bring, beside the installed Triton, which is newer.
SECOND = "3.6.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ept-kernels" / f"triton-{SECOND}"


def run(script: Path, *words: str, cache: Path, triton: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``script`` as a user would, compiling anew, with the Triton of a folder or the installed one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(str(each) for each in (triton, REPOSITORY) if each is not None)
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    return subprocess.run([sys.executable, script, *words], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def second_triton() -> Path:
    """A folder with the second Triton, which a first run downloads from PyPI."""
    if not (CACHE / "triton").is_dir():
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(CACHE),
            f"triton=={SECOND}",
        ]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"triton {SECOND} could not be installed into {CACHE}: {done.stderr.strip().splitlines()[-1:]}")
    return CACHE


@pytest.fixture(params=["installed", SECOND])
def triton_folder(request: pytest.FixtureRequest) -> Path | None:
    return None if request.param == "installed" else request.getfixturevalue("second_triton")


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(["--kernel", "fused_kernel", "--case", "4096x4096, T=8192"], id="products"),
        pytest.param(["--each", "--case", "default, mixed groups", "--kernel", "core_kernel"], id="core"),
        pytest.param(
            ["--each", "--case", "default, mixed groups", "--kernel", "kernel_grad_kernel"], id="core gradient"
        ),
        pytest.param(["--each", "--case", "dropout", "--kernel", "dropout_kernel"], id="dropout"),
    ],
)
def test_what_ships_passes(chosen: list[str], triton_folder: Path | None, tmp_path: Path) -> None:
    """On an H100, in bf16: the kernels that most of the time goes to."""
    report = tmp_path / "report.csv"
    words = ["--target", "sm_90", "--dtype", "bf16", "--jobs", "1", *chosen, "--output", str(report)]
    done = run(REPORT, *words, cache=tmp_path / "cache", triton=triton_folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Triton {SECOND}" in done.stdout or triton_folder is None
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and not any(row["wrong"] or int(row["local"]) for row in rows)
    if "fused_kernel" in chosen:
        assert len(rows) == 6 and all("HGMMA" in row["matrix"] for row in rows)


def verdicts(names: list[str], cache: Path, triton: Path | None = None) -> dict[str, list[str]]:
    done = run(Path(__file__).with_name("planted.py"), *names, cache=cache, triton=triton)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return verdicts([], tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", ["innocent", "innocent on AMD", "innocent loops"])
def test_sound_kernels_pass(name: str, planted: dict[str, list[str]]) -> None:
    assert planted[name] == []


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
def test_planted_violations_are_caught(name: str, reason: str, planted: dict[str, list[str]]) -> None:
    assert any(reason in line for line in planted[name]), planted[name]


def test_serialised_matrix_instructions_are_caught(second_triton: Path, tmp_path: Path) -> None:
    found = verdicts(["loops", "innocent loops"], tmp_path, second_triton)
    assert any("C7515" in line for line in found["loops"]), found
    assert found["innocent loops"] == []


def test_batches_share_compiled_kernels(tmp_path: Path) -> None:
    """Over 352 batches, a kernel is compiled once for each choice of tiles and switches, whatever the numbers."""
    done = run(Path(__file__).with_name("specialisations.py"), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    both = {"interleave_kernel", "core_kernel", "fused_kernel"}
    backward = {"kernel_grad_kernel", "gather_kernel", "logits_grad_kernel", "fold_grad_kernel"}
    expected = {f"{kernel}, {which}" for kernel in both for which in ("forward", "backward")}
    assert expected | {f"{kernel}, backward" for kernel in backward} | {"fold_kernel, forward"} <= set(counts)
    for which, (compiled, needed) in counts.items():
        assert compiled == needed <= 12, which


def test_interpreting_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, REPORT, "--target", "sm_80", "--dtype", "bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    done = run(REPORT, "--jobs", "0", cache=tmp_path)
    assert done.returncode == 2
    assert "--jobs must be at least 1, got 0" in done.stderr
