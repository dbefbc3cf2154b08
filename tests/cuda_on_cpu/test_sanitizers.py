"""The unmodified kernels pass in the driver, in either order of the threads of a block, and under the sanitizers.

The controls of ``test_mutants.py``: what a fault is caught by accepts the kernels as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_on_cpu.build import Build
from cuda_on_cpu.checks import SAMPLE
from cuda_on_cpu.driver import run_in


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("reverse", [False, True], ids=["first thread first", "last thread first"])
@pytest.mark.parametrize("flavour", ["plain", "address"])
@pytest.mark.usefixtures("on_cpu")
def test_sampled_checks(name: str, flavour: str, reverse: bool, build: Callable[[str], Build], tmp_path: Path) -> None:
    assert run_in(build(flavour).folder / "driver", SAMPLE[name], tmp_path, reverse=reverse) is None


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.usefixtures("on_cpu")
def test_no_data_race(name: str, build: Callable[[str], Build], tmp_path: Path) -> None:
    """Within a block and between blocks: only barriers order the threads."""
    assert run_in(build("thread").folder / "driver", SAMPLE[name], tmp_path) is None
