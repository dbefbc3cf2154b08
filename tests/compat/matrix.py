"""Tests the package, as it would be installed, in environments of other versions: one printed row for each.

``python tests/compat/matrix.py [NAME ...] [--folder FOLDER] [--keep]``; ``make compat`` runs all. For each environment:
a virtual environment, torch (a CPU build where one can be had), the package from its sdist, ``smoke.py``, then a subset
of the tests against the installed package. An interpreter that this machine lacks is a row that says so. It exits
with 1 where anything failed. A CUDA build of torch, the last resort, takes about 7 GB; environments are deleted after
their row unless ``--keep``.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "ept-kernels"

#: Layers and the kernels of the torch and cpu backends, the tuner with saving and loading, short trainings.
TESTS = (
    "tests/kernels/test_ops.py",
    "tests/kernels/test_native.py",
    "tests/layer/test_eptlinear.py",
    "tests/integration/test_tuner.py",
    "tests/training/test_trainer.py",
)
TOOLS = ("pytest>=8", "hypothesis>=6.100", "setuptools>=77", "pybind11>=2.12")


@dataclass(frozen=True)
class Environment:
    """An interpreter, the versions to pin (the rest is the newest that fits), and whether toolchains are hidden."""

    python: str
    torch: str
    pins: tuple[str, ...] = ()
    bare: bool = False


def floors() -> dict[str, str]:
    """The oldest version that this package declares of each dependency, those of the ``train`` extra included."""
    found = {}
    for text in metadata.requires(PACKAGE) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "train"}):
            continue
        oldest = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
        found[requirement.name] = oldest[0]
    return found


def environments() -> dict[str, Environment]:
    oldest = floors()
    ci = ci_torch()
    return {
        "oldest": Environment(
            "3.10", oldest["torch"], tuple(f"{name}=={version}" for name, version in oldest.items() if name != "torch")
        ),
        "python3.11": Environment("3.11", ci),
        "python3.12": Environment("3.12", ci),
        "newest": Environment("3.13", ""),
        "bare": Environment("3.11", ci, bare=True),
    }


def ci_torch() -> str:
    """The version of torch that the Makefile pins."""
    line = next(line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "TORCH_VERSION ?=" in line)
    return line.split("=")[1].strip()


def interpreter(version: str) -> Path | None:
    """A Python of that version: this one, one on the path, or one of pyenv's."""
    named = [sys.executable, *filter(None, [shutil.which(f"python{version}")])]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in [*named, *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]:
        told = subprocess.run(
            [candidate, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True
        )
        if told.returncode == 0 and told.stdout.decode().strip() == version:
            return Path(candidate)
    return None


def build_sdist(folder: Path) -> Path:
    """The source distribution of this tree."""
    script = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    done = run([sys.executable, "-c", script, folder], cwd=REPOSITORY)
    return folder / done.stdout.splitlines()[-1]


class Failed(Exception):
    """A command that did not do what the environment needs; the message is the end of its output."""


def run(command: Sequence[object], **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))[:200]}\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    return done


def install_torch(python: Path, version: str, pins: Sequence[str]) -> None:
    """torch as the Makefile gets it: a CPU wheel where pip looks, one that uv knows of, the CUDA build of the index."""
    pip = [python, "-m", "pip", "install", "-q"]
    wanted = f"torch=={version}" if version else "torch"
    uv = [python, "-m", "uv", "pip", "install", "-q", "--python", python, "--torch-backend", "cpu", wanted, *pins]
    attempts = [[*pip, f"{wanted}+cpu", *pins]] if version else []
    attempts += [uv, [*pip, "--upgrade", wanted, *pins]]
    for attempt in attempts[:-1]:
        if subprocess.run(list(map(str, attempt)), capture_output=True).returncode == 0:
            return
    run(attempts[-1])


def prepare(environment: Environment, base: Path, sdist: Path, folder: Path) -> Path:
    """Makes the virtual environment and installs the package; returns its interpreter."""
    run([base, "-m", "venv", folder])
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", "--upgrade", "pip>=24", "uv"])
    numpy = [pin for pin in environment.pins if pin.startswith("numpy")]
    install_torch(python, environment.torch, numpy)
    variables = dict(os.environ)
    if environment.bare:  # neither compiler nor nvcc; CMake also looks where a path does not lead
        variables |= {"PATH": str(python.parent), "CXX": "/nowhere/c++", "CUDACXX": "/nowhere/nvcc"}
    install = [python, "-m", "pip", "install", "-v", f"{sdist}[train]", *environment.pins, *TOOLS]
    said = run(install, env=variables)
    for line in (said.stdout + said.stderr).splitlines():
        if "left out" in line:
            print("   ", line.strip(), flush=True)
    if environment.bare:
        run([python, "-m", "pip", "uninstall", "-q", "-y", "triton"])
    return python


def versions(python: Path) -> dict[str, str]:
    names = ("torch", "transformers", "peft")
    script = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    return dict(zip(names, run([python, "-c", script, *names]).stdout.split(), strict=True))


def test(python: Path, source: Path, work: Path) -> dict[str, object]:
    """Runs the tests that lie in ``source`` against the installed package; counts from pytest's own report."""
    report = work / "report.xml"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    variables.pop("PYTHONPATH", None)
    # The command, not ``python -m pytest``, which would put the source on the path before the installed package.
    command = [python.with_name("pytest"), "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    done = subprocess.run(list(map(str, command)), cwd=source, env=variables, capture_output=True, text=True)
    (work / "pytest.log").write_text(done.stdout + done.stderr)
    if not report.exists():
        raise Failed(done.stdout[-3000:] + done.stderr[-3000:])
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(float(suite.get("time", 0))),
    }


def row(name: str, environment: Environment, sdist: Path, folder: Path) -> dict[str, object]:
    found: dict[str, object] = {"environment": name, "python": environment.python}
    base = interpreter(environment.python)
    if base is None:
        return {**found, "outcome": f"skipped: this machine has no Python {environment.python}"}
    work = folder / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        python = prepare(environment, base, sdist, work / "venv")
        found |= versions(python)
        run(
            [python, Path(__file__).with_name("smoke.py"), *(["--without-native"] if environment.bare else [])],
            cwd=work,
        )
        with tarfile.open(sdist) as archive:
            archive.extractall(work)
        (source,) = work.glob("ept_kernels-*")
        # The tests of the sdist, beside no package: what they import is what is installed.
        for package in ("ept", "ept_kernels"):
            shutil.rmtree(source / package)
        found |= test(python, source, work)
        found["outcome"] = "failed" if found["failed"] else "passed"
    except Failed as error:
        (work / "error.log").write_text(str(error))
        found["outcome"] = f"failed: see {work / 'error.log'}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = environments()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "compat", help="default: runs/compat")
    parser.add_argument("--keep", action="store_true", help="keep the virtual environments")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(known):
        parser.error(f"unknown environments {sorted(unknown)}; allowed: {', '.join(known)}")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sdist = build_sdist(folder)
    columns = (
        "environment",
        "python",
        "torch",
        "transformers",
        "peft",
        "passed",
        "failed",
        "skipped",
        "seconds",
        "outcome",
    )
    rows = []
    for name in arguments.names or known:
        rows.append(row(name, known[name], sdist, folder))
        print(" | ".join(str(rows[-1].get(column, "")) for column in columns), flush=True)
        if not arguments.keep:
            shutil.rmtree(folder / name / "venv", ignore_errors=True)
    with (folder / "matrix.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return int(any(str(found["outcome"]).startswith("failed") for found in rows))


if __name__ == "__main__":
    sys.exit(main())
