"""Planted faults are caught: the stand-in for the GPU, the calls and the comparison are worth something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_on_cpu.build import Build
from cuda_on_cpu.checks import SAMPLE
from cuda_on_cpu.driver import run_in
from cuda_on_cpu.mutants import MUTANTS

#: What a report says, by detector.
_WORDS = {"values": ("wrong: ",), "address": ("AddressSanitizer", "runtime error"), "thread": ("data race",)}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.usefixtures("on_cpu")
def test_caught(name: str, build: Callable[[str], Build], tmp_path: Path) -> None:
    """By the detector named, in the check named; ``test_sanitizers.py`` holds the control without a fault."""
    mutant = MUTANTS[name]
    flavour = "plain" if mutant.detector == "values" else mutant.detector
    driver = mutant.plant(build(flavour), tmp_path / "mutant")
    report = run_in(driver, SAMPLE[mutant.check], tmp_path)
    assert report is not None, f"nothing noticed: {name}"
    assert any(word in report for word in _WORDS[mutant.detector]), report
