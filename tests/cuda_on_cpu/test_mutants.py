"""Planted faults are caught: the stand-in for the GPU, the calls and the comparison are worth something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_on_cpu.build import Build
from cuda_on_cpu.harness import Suite
from cuda_on_cpu.mutants import MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_caught(name: str, build: Callable[[str], Build], sample: Suite, threads: Suite, tmp_path: Path) -> None:
    """By the detector named; ``test_sanitizers.py`` holds the control without a fault."""
    mutant = MUTANTS[name]
    flavour = "plain" if mutant.detector == "values" else mutant.detector
    driver = mutant.plant(build(flavour), tmp_path / "mutant")
    report = (threads if flavour == "thread" else sample).run(driver)
    assert report is not None, f"nothing noticed: {name}"
    expected = {"values": "relative error", "address": ("AddressSanitizer", "runtime error"), "thread": "data race"}
    words = expected[mutant.detector]
    assert any(word in report for word in ([words] if isinstance(words, str) else words)), report
