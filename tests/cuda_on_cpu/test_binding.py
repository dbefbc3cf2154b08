"""``torch.ops.ept_cuda`` refuses what does not fit before it does anything, naming the argument."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pyramid_testing import Case

from ept_kernels import PyramidGeometry, cuda_backend

pytestmark = pytest.mark.usefixtures("library")

GEOMETRY = PyramidGeometry(12, 9, 2, (2, 3))
PROBLEM = Case(GEOMETRY, lead=(6,), grouping="sample", num_groups=3).tensors(torch.float32)
Y = torch.zeros(6, 9)

WRONG = {
    "x: columns": ({"x": torch.zeros(6, 4)}, r"A must be \[2, 2\], got \[2, 6\] of float32"),
    "x: dimensions": ({"x": torch.zeros(12)}, r"x must be \[T, in\], got \[12\] of float32"),
    "x: dtype": (
        {"x": torch.zeros(6, 12, dtype=torch.float64), "y": torch.zeros(6, 9, dtype=torch.float64)},
        "x must be float32, float16 or bfloat16, got .* of float64",
    ),
    "x: strides": ({"x": torch.zeros(12, 6).T}, "x must be contiguous inside a row"),
    "y: rows": ({"y": torch.zeros(5, 9)}, r"y must be \[6, 9\], got \[5, 9\]"),
    "y: dtype": ({"y": torch.zeros(6, 9, dtype=torch.float16)}, "y must be float32, got .* of float16"),
    "A: shape": ({"A": torch.zeros(2, 5)}, r"A must be \[2, 6\], got \[2, 5\]"),
    "A: dtype": ({"A": torch.zeros(2, 6, dtype=torch.bfloat16)}, "A must be float32, got .* of bfloat16"),
    "B: shape": ({"B": torch.zeros(4, 2)}, r"B must be \[5, 2\], got \[4, 2\]"),
    "B: strides": ({"B": torch.zeros(2, 5).T}, "B must be contiguous"),
    "folded: width": ({"folded": torch.zeros(3, 12)}, r"folded must be \[3, 13\], got \[3, 12\]"),
    "folded: empty": ({"folded": torch.zeros(0, 13), "groups": None}, "folded must hold a group"),
    "groups: length": (
        {"groups": torch.zeros(4, dtype=torch.int64)},
        r"groups must be of a length that divides the 6 rows, got \[4\] of int64",
    ),
    "groups: none": ({"groups": torch.zeros(0, dtype=torch.int64)}, "groups must be of a length that divides"),
    "groups: dtype": ({"groups": torch.zeros(6)}, r"groups must be int32, got \[6\] of float32"),
    "groups: dimensions": ({"groups": torch.zeros(6, 1, dtype=torch.int64)}, r"groups must be \[N\], got \[6, 1\]"),
    "scales: order": ({"scales": [3, 2]}, "scales must be ascending integers >= 1, got 2 in position 1"),
    "scales: none": ({"scales": []}, "scales must hold 1 to 32 distinct kernel sizes, got 0"),
    "scales: zero": ({"scales": [0, 2]}, "scales must be ascending integers >= 1, got 0 in position 0"),
}


def arguments(**changed) -> dict:
    given = {"y": Y, "x": PROBLEM.x, "A": PROBLEM.A, "B": PROBLEM.B, "folded": PROBLEM.folded}
    return {**given, "groups": PROBLEM.groups, "scales": [2, 3], "accumulate": False, **changed}


def test_the_call_that_the_others_change() -> None:
    torch.ops.ept_cuda.delta_(**arguments())


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG)
def test_refused(changed: dict, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.ept_cuda.delta_(**arguments(**changed))


def test_backward_and_weight_check_theirs() -> None:
    rest = (PROBLEM.A, PROBLEM.B, PROBLEM.folded)
    with pytest.raises((RuntimeError, ValueError), match=r"grad must be \[6, 9\], got \[5, 9\]"):
        torch.ops.ept_cuda.delta_backward_(None, Y[:5], PROBLEM.x, *rest, None, [2, 3], False, True, True, True)
    with pytest.raises((RuntimeError, ValueError), match=r"grad_x must be \[6, 12\], got \[6, 9\]"):
        torch.ops.ept_cuda.delta_backward_(Y, Y, PROBLEM.x, *rest, None, [2, 3], False, True, True, True)
    with pytest.raises((RuntimeError, ValueError), match=r"base must be \[9, 12\], got \[6, 9\]"):
        torch.ops.ept_cuda.weight(*rest, 12, 9, [2, 3], Y)
    with pytest.raises((RuntimeError, ValueError), match=r"grad must be \[groups, out, in\], got \[6, 9\]"):
        torch.ops.ept_cuda.weight_backward(Y, *rest, [2, 3], True, True, True)
    with pytest.raises((RuntimeError, ValueError), match=r"grad must be \[3, 9, 12\], got \[1, 9, 12\]"):
        torch.ops.ept_cuda.weight_backward(torch.zeros(1, 9, 12), *rest, [2, 3], True, True, True)


def test_more_scales_than_a_mask_holds() -> None:
    many = Case(PyramidGeometry(40, 40, 1, tuple(range(1, 34))), lead=(6,)).tensors(torch.float32)
    with pytest.raises((RuntimeError, ValueError), match="scales must hold 1 to 32 distinct kernel sizes, got 33"):
        torch.ops.ept_cuda.delta_(
            torch.zeros(6, 40), many.x, many.A, many.B, many.folded, None, list(range(1, 34)), False
        )


def test_an_output_may_be_a_part_of_a_wider_tensor() -> None:
    wide = torch.full((6, 11), float("nan"))
    torch.ops.ept_cuda.delta_(**arguments(y=wide[:, 1:10]))
    torch.ops.ept_cuda.delta_(**arguments())
    assert torch.equal(wide[:, 1:10], Y)
    assert wide[:, [0, 10]].isnan().all()


def test_the_library_says_what_it_was_compiled_for(library: Path) -> None:
    """The one at hand for no GPU at all; ``test_nvcc`` reads what nvcc made."""
    assert cuda_backend.build_info(library) == {"architectures": [], "compiler": "no nvcc"}


def test_a_library_that_is_not_there_has_no_build_info(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"missing\.so has not been built"):
        cuda_backend.build_info(tmp_path / "missing.so")
