"""The small kernels of every backend alone: what ``make memcheck`` runs, and the interpreter for Triton's on a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_testing import KERNELS, small_kernels
from small_kernels_testing import (
    CORES,
    DROPOUTS,
    FACTORS,
    FUSED,
    SPANS,
    Core,
    Dropout,
    Fused,
    check_core,
    check_dropout,
    check_fused,
    check_gather,
    check_interleave,
    check_needs,
)

#: Sizes that only a GPU computes in reasonable time.
LARGE = {
    "a layer's rows": Core(8192, 8, (2, 4, 6, 8), runs=8, num_groups=8),
    "a layer's rows, one id each, inactive": Core(8192, 8, (2, 4, 6, 8), runs=8192, num_groups=64, active=True),
    "strange groups among many": Core(4096, 16, (2, 8, 16), runs=4096, num_groups=100, strange=True),
    "large scales": Core(512, 4, (16, 33, 70), runs=4, num_groups=3),
    "fp16": Core(2048, 8, (2, 4, 6, 8), dtype=torch.float16),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", FACTORS)
def test_interleave_and_gather(name: str, backend: str) -> None:
    kernels = small_kernels(backend)
    check_interleave(kernels, FACTORS[name], "cuda")
    check_gather(kernels, FACTORS[name], "cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", [*CORES.values(), *SPANS.values(), *LARGE.values()], ids=[*CORES, *SPANS, *LARGE])
def test_core(case: Core, backend: str) -> None:
    if backend == "torch" and (case.active or not case.num_groups):
        pytest.skip("plain torch multiplies by the zeros of inactive kernels, and takes no empty table")
    check_core(small_kernels(backend), case, "cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_core_computes_what_is_asked_for(needs: tuple[bool, bool, bool], backend: str) -> None:
    check_needs(small_kernels(backend), Core(rows=9, runs=3, num_groups=2), needs, "cuda")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", [*DROPOUTS.values(), Dropout(1000, 4096)], ids=[*DROPOUTS, "a layer's rows"])
def test_dropout(case: Dropout, backend: str) -> None:
    check_dropout(small_kernels(backend), case, "cuda")


@pytest.mark.parametrize(
    "case",
    [*FUSED.values(), Fused(1200, 768, 520, 160), Fused(33, 4096, 1024, 160, dtype=torch.bfloat16)],
    ids=[*FUSED, "several bands", "few rows"],
)
def test_fused(case: Fused) -> None:
    small_kernels("triton")
    from ept_kernels.triton import fused

    check_fused(fused, case, "cuda")
