"""The unmodified kernels pass plainly, in either order of the threads of a block, and under the sanitizers.

The controls of ``test_mutants.py``: what a fault is caught by accepts the kernels as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu.build import Build
from cuda_on_cpu.calls import SAMPLE
from cuda_on_cpu.harness import Call, Suite


@pytest.mark.parametrize("flavour", ["plain", "address"])
@pytest.mark.parametrize("reverse", [False, True], ids=["first thread first", "last thread first"])
def test_sampled_calls(flavour: str, reverse: bool, build: Callable[[str], Build], sample: Suite) -> None:
    assert sample.run(build(flavour).folder / "driver", reverse=reverse) is None


def test_no_data_race(build: Callable[[str], Build], threads: Suite) -> None:
    """Within a block and between blocks: only barriers order the threads."""
    assert threads.run(build("thread").folder / "driver") is None


def test_a_group_outside_the_table_is_refused_on_the_device(build: Callable[[str], Build], tmp_path) -> None:
    """Rather than reading other memory; torch's own indexing does the same."""

    class Outside(Call):
        def problem(self):
            problem = super().problem()
            return replace(problem, groups=problem.groups + self.case.num_groups) if self.outside else problem

        outside = False

    call = Outside(SAMPLE[0].case, torch.float32)
    suite = Suite([call], tmp_path, "inside")
    assert suite.run(build("plain").folder / "driver") is None
    Outside.outside = True
    suite.input.write_bytes((1).to_bytes(8, "little") + call.encode())
    report = suite.run(build("plain").folder / "driver")
    assert report is not None and "groups holds an index outside folded" in report
