"""The calls that the sanitizers and the planted mutants run: small, and through every kernel."""

from __future__ import annotations

from dataclasses import replace

import torch
from cuda_on_cpu.harness import Call
from pyramid_testing import Case

from ept_kernels import PyramidGeometry

#: Scales with and without their own code, one switched off; several groups in a tile of rows.
_BY_SAMPLE = Case(
    PyramidGeometry(70, 45, 3, (2, 3, 5, 8)), lead=(2, 20), grouping="sample", num_groups=3, zero_scale=True, seed=2
)
#: More ranks than a register block, a scale wider than a warp, a group for every row of which one lacks a scale.
_BY_ROW = Case(
    PyramidGeometry(45, 140, 9, (1, 4, 6, 35)), lead=(17,), grouping="row", num_groups=2, zero_groups=(0,), seed=2
)
#: More columns of intermediates than a round of the tensor-core kernels.
_WIDE = Case(PyramidGeometry(67, 50, 16, (2, 7, 11)), lead=(67,), seed=3)
_NO_ROWS = replace(_BY_SAMPLE, lead=(2, 0), seed=4)
_ONE_ROW = replace(_BY_ROW, lead=(1,), grouping="one", seed=5)

SAMPLE = [
    Call(_BY_SAMPLE, wide=False),
    Call(_BY_SAMPLE, torch.bfloat16, tensor_cores=True, accumulate=True),
    Call(_BY_SAMPLE, torch.float16, padding=3, accumulate=True),
    Call(_BY_ROW, padding=2),
    Call(_BY_ROW, torch.float16, tensor_cores=True, padding=3),
    Call(_WIDE, torch.float32, accumulate=True),
    Call(_WIDE, torch.bfloat16, tensor_cores=True, padding=5),
    Call(_NO_ROWS),
    Call(_NO_ROWS, torch.bfloat16, tensor_cores=True),
    Call(_ONE_ROW, torch.bfloat16),
    Call(_ONE_ROW, torch.float16, tensor_cores=True),
]
#: More than one block in each direction of every grid.
THREADS = [
    Call(replace(_BY_ROW, lead=(11,))),
    Call(replace(_BY_SAMPLE, lead=(2, 5))),
    Call(replace(_BY_SAMPLE, lead=(2, 33)), torch.bfloat16, tensor_cores=True),
    Call(replace(_WIDE, lead=(17,)), torch.float16, tensor_cores=True),
]
