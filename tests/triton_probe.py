"""A few fast checks of the interpreted kernels, to tell a broken kernel from a right one: ``python triton_probe.py``.

``tests/triton_interpreter/test_mutants.py`` runs it on copies of the package with an error planted in each; exit status
1 and the name of the check that failed, or 0.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["EPT_BACKEND"] = "triton"

import pytest
import torch
from fold_testing import FoldCase, LargeFoldCase, SaturatedFoldCase, assert_matches_definition, assert_nan_shows
from fold_testing import assert_ties_go_to_the_first as ties
from interpreter_trace import traced
from pyramid_testing import Case, assert_all_match
from test_active import test_a_group_that_does_not_exist_makes_its_rows_nan as strange_group
from test_active import test_kernels_of_rows_are_summed_in_two_stages as two_stages
from test_active import test_values_and_gradients as partly_active
from test_fold import test_a_task_that_the_table_lacks as strange_task
from test_fold import test_an_expert_that_is_not_selected_is_not_read as expert_not_selected
from test_manners import test_a_bad_input_reaches_its_own_row_of_the_output_only as bad_input
from test_manners import test_all_kernels_zero as all_kernels_zero
from test_manners import test_groups_of_different_scales as groups_of_different_scales
from test_manners import test_offsets_beyond_int32 as large_offsets
from test_manners import test_row_sums_over_many_spans as many_spans
from test_values import EDGES, SMALL, assert_exact, evaluated

from ept_kernels import PyramidGeometry, reference
from ept_kernels.triton.fold import fold_tasks


def half_in_one_launch() -> None:
    """A product that waits for two shrink tiles."""
    problem = Case(PyramidGeometry(24, 16, 2, (2, 3)), (130,)).tensors(torch.float16, torch.float32)
    truth = problem.evaluate(reference, "pyramid_linear", dtype=torch.float64)
    assert_all_match(evaluated(problem, "single"), truth, 4e-3)


def folds(case: FoldCase):
    def check(patch: pytest.MonkeyPatch) -> None:
        with traced():
            assert_matches_definition(case, fold_tasks)

    return check


def edge(name: str, how: str):
    return lambda patch: assert_exact(EDGES[name].tensors(torch.float32), how)


CHECKS = {
    "short segments, mixed": edge("short segments, mixed", "delta"),
    "a row block and a row": edge("a row block and a row", "split"),
    "rank blocks": edge("rank blocks below a matrix instruction", "delta"),
    "several tiles": edge("several tiles of the base product", "fused"),
    "one launch": lambda patch: assert_exact(replace(EDGES["a row block and a row"]).tensors(torch.float32), "single"),
    "mixed groups": edge("two row blocks, mixed groups", "delta"),
    "scale unused": lambda patch: assert_exact(Case(SMALL, (9,), zero_scale=True).tensors(torch.float32), "fused"),
    "kernels zero": lambda patch: all_kernels_zero(Case(SMALL, (5,)), "fused", patch),
    "groups of different scales": lambda patch: groups_of_different_scales(3),
    "NaN": lambda patch: bad_input(1, [0], float("nan")),
    "spans": lambda patch: many_spans("fused", patch),
    "large offsets": lambda patch: large_offsets("fused", "features", patch),
    "active, mixed groups": lambda patch: partly_active("samples mixed", "delta", patch),
    "active, groups apart": lambda patch: partly_active("samples apart", "delta", patch),
    "two stages": lambda patch: two_stages("delta", True, patch),
    "strange group": lambda patch: strange_group("delta", (40,), False, patch),
    "half in one launch": lambda patch: half_in_one_launch(),
    "fold, several tasks": folds(FoldCase(9)),
    "fold, more than a tile": folds(LargeFoldCase(3)),
    "fold, saturated": folds(SaturatedFoldCase(1)),
    "fold, ties": lambda patch: ties(fold_tasks),
    "fold, NaN": lambda patch: assert_nan_shows(FoldCase(7, 3), fold_tasks),
    "fold, expert not selected": lambda patch: expert_not_selected(),
    "fold, strange task": lambda patch: strange_task(3),
}


def main() -> int:
    for name, check in CHECKS.items():
        with pytest.MonkeyPatch.context() as patch:
            try:
                check(patch)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                return 1
    print("all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
