"""The built package: what is in it, and what importing it costs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ept.extras import train_extra

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as git has it: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source") / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    # Pure Python: what `make setup` compiles is tested as it stands.
    environment = {**os.environ, "EPT_BUILD_CPU": "0", "EPT_BUILD_CUDA": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_two_packages_and_the_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ept", "ept_kernels"}
    assert wheel.name.endswith("-none-any.whl"), "without native code it fits every platform"
    sources = {str(p.relative_to(REPOSITORY)) for top in tops for p in (REPOSITORY / top).rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    for command in ("train = ept.train:main", "export = ept.export.cli:main", "inspect = ept.inspecting.cli:main"):
        assert f"ept-{command}" in entry_points
    assert {"ept/inspecting/page.css", "ept/inspecting/page.js"} <= set(names)
    assert {"ept/py.typed", "ept_kernels/py.typed"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_builds_and_tests_itself(source: Path, tmp_path: Path) -> None:
    """All that git has but what belongs to a clone alone, and no product of a build."""
    (source / "ept_kernels" / "_C.so").touch()  # as a build in place leaves it
    script = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=source, capture_output=True, text=True)
    (source / "ept_kernels" / "_C.so").unlink()
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml", "Makefile"} <= names
    for folder in ("csrc", "docs", "ept", "ept_kernels", "requirements", "tests"):
        expected = {str(p.relative_to(source)) for p in (source / folder).rglob("*") if p.is_file()}
        expected = {name for name in expected if not name.endswith((".pyc", ".so"))}
        assert expected <= names, f"the sdist lacks {sorted(expected - names)}"
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_imports_by_itself_without_cuda_or_triton(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = """
import sys
sys.modules["triton"] = None  # importing it would raise
import peft, torch
before = set(sys.modules)

def refuse(*args, **kwargs):
    raise AssertionError("importing ept asked torch for a GPU")

for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, refuse)
import ept, ept_kernels
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not {"datasets", "matplotlib", "pyarrow", "rich", "sklearn", "scipy"} & added, added
assert "torch.utils.cpp_extension" not in set(sys.modules) - before
assert ept.__file__.startswith(sys.argv[1]), ept.__file__
assert not torch.cuda.is_initialized()
layer = ept.EPTLinear(12, 16, config=ept.EPTConfig(num_tasks=1))
print(layer(torch.ones(2, 12)).shape)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "[2, 16]" in done.stdout


@pytest.mark.parametrize("module", ["ept.data", "ept.training", "ept.train", "ept.demo"])
def test_a_missing_extra_is_named(module: str) -> None:
    """Only ``import ept`` works without the extra; all else says which one it wants."""
    script = """
import importlib, sys
sys.modules["datasets"] = sys.modules["rich"] = None  # importing them raises, as if they were not installed
import ept
try:
    importlib.import_module(sys.argv[1])
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, module], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    what = "ept-train" if module == "ept.train" else module
    assert done.stdout.startswith(f"{what} needs "), done.stdout
    assert done.stdout.rstrip().endswith("which is not installed: pip install 'ept-kernels[train]'")


def test_a_broken_install_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'ept\.nonsense'$"), train_extra("ept.data"):
        importlib.import_module("ept.nonsense")


def test_kernels_never_import_ept() -> None:
    for path in (REPOSITORY / "ept_kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import ept.", "from ept ", "from ept.")), f"{path.name}: {line}"
            assert line.strip() != "import ept", path.name


def test_no_folder_of_tests_passes_for_a_package_that_is_not_installed() -> None:
    """pytest puts ``tests`` on the path, where ``tests/triton`` would answer to ``import triton``."""
    required = {Requirement(text).name for text in metadata.requires("ept-kernels") or ()}
    assert "triton" in required
    assert not required & {path.stem for path in (REPOSITORY / "tests").iterdir()}
