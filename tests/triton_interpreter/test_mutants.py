"""Plants errors in copies of the kernels' modules, one at a time: the checks of the kernels must notice each."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fold_testing import (
    FoldCase,
    ManyGroupsFoldCase,
    SaturatedFoldCase,
    assert_matches_definition,
    assert_nan_shows,
    assert_ties_go_to_the_first,
    assert_unknown_tasks_show,
    assert_unselected_experts_are_not_read,
)
from interpreter_trace import traced
from small_kernels_testing import (
    CORES,
    DROPOUTS,
    FACTORS,
    FUSED,
    SMALL_TILE,
    SPANS,
    Core,
    check_core,
    check_dropout,
    check_fused,
    check_gather,
    check_interleave,
)

from ept_kernels import fold_tasks
from ept_kernels.triton import fold

#: By file: what is wrong, the text that is replaced wherever it stands, and what stands there instead.
MUTANTS = {
    "interleave.py": {
        "channels beyond the last are written": ("inside = c < features", "inside = c < features + 1"),
        "slots are shifted": ("(c % SCALES[s])[None, :] ==", "((c + 1) % SCALES[s])[None, :] =="),
        "slots beyond a block are dropped": ("range(0, SCALES[s], SLOTS)", "range(0, SLOTS, SLOTS)"),
        "slots beyond the last are written": ("mask=(q < SCALES[s])[:, None] & ", "mask="),
        "strides of A are swapped": ("*A.stride()", "*A.stride()[::-1]"),
        "strides of B are swapped": ("*B.stride()", "*B.stride()[::-1]"),
        "every scale is written to the first": ("hat_ptr += tl.cast(RANK * SCALES[s], tl.int64) * features", "pass"),
        "the seed's neighbours are read": ("(c // SCALES[s])", "(c % SCALES[s])"),
        "column offsets overflow": ("(c // SCALES[s]).to(tl.int64)", "(c // SCALES[s] * 2**31 // 2**31)"),
        "sums go beyond the last channel": ("mask=c < features,", "mask=c < features + 1,"),
        "sums of the first slot": ("c = j * SCALES[s] + q", "c = j * SCALES[s]"),
        "one slot is not summed": ("for q in range(SCALES[s])", "for q in range(SCALES[s] - 1)"),
        "gradients beyond the last are written": ("mask=j < width", "mask=j < width + 1"),
        "the gradient of B is not transposed": ("height, 1, RANK, RANK", "height, height, 1, RANK"),
        "partial sums are half": (".to(tl.float32)", ".to(tl.float16).to(tl.float32)"),
    },
    "core.py": {
        "kernels are transposed": (
            "SCALES[s],\n                        1,\n",
            "1,\n                        SCALES[s],\n",
        ),
        "LINE and STEP are swapped": ("(i * LINE + j * STEP)", "(i * STEP + j * LINE)"),
        "inactive kernels are applied": ("used = exists & (tl.load", "used = exists | (tl.load"),
        "one scale's use decides for all": ("* len(SCALES) + s", "* len(SCALES)"),
        "a group beyond the last is read": ("(group < num_groups)", "(group <= num_groups)"),
        "a negative group is read": ("(group >= 0) & ", "(group >= -1) & "),
        "rows without a group are zero": ('float("nan")', "0.0"),
        "rows without a group are not written": ("mask=inside[:, None] & (i", "mask=exists[:, None] & (i"),
        "every row has a group of its own": ("row // segment", "row"),
        "segments are one row too long": ("row // segment", "row // (segment + 1)"),
        "slots beyond a block are dropped": ("for i0 in range(0, K, SLOTS)", "for i0 in range(0, SLOTS, SLOTS)"),
        "slots beyond the last are written": (
            "mask=inside[:, None] & (i < K)[None, :]",
            "mask=inside[:, None] & (i < K + 1)[None, :]",
        ),
        "slots beyond the last are read": ("wanted = used[:, None] & (i < K)", "wanted = used[:, None] & (i < K + 1)"),
        "items beyond the last are written": ("inside = row < rows", "inside = row < rows + 1"),
        "columns of a rank before": ("row * WIDTH + (column + p * SCALES[s])", "row * WIDTH + column"),
        "every scale has the first one's columns": ("column += RANK * SCALES[s]", "column += 0"),
        "every scale has the first one's kernels": ("entry += SCALES[s] * SCALES[s]", "entry += 0"),
        "group 0's kernels for all": ("(group * FOLDED + entry)", "(group * 0 + entry)"),
        "a span ends a row late": ("tl.minimum(first + length, rows)", "tl.minimum(first + length + 1, rows)"),
        "a span ends after the last row": ("tl.minimum(first + length, rows)", "first + length"),
        "a span begins a row late": ("first = span.to(tl.int64) * length", "first = span.to(tl.int64) * length + 1"),
        "spans after the first are dropped": ("sums.sum(1)", "sums[:, 0]"),
        "inactive kernels get a gradient": ("end = tl.where(used, end, 0)", "end = end"),
        "rows of other groups are summed": ("segment) == group)", "segment) >= group)"),
        "a block without its first row is skipped": (
            "tl.max(own.to(tl.int32), 0) > 0",
            "tl.sum(tl.where(tl.arange(0, ITEMS) == 0, own.to(tl.int32), 0), 0) > 0",
        ),
        "items after the first block are dropped": ("range(first, end, ITEMS)", "range(first, first + ITEMS, ITEMS)"),
        "the gradient is transposed": ("a[:, None] * K + q[None, :]", "q[None, :] * K + a[:, None]"),
        "gradient slots share a block": ("q = q0 + tl.arange", "q = a0 + tl.arange"),
        "gradient slots beyond a block are dropped": (
            "for q0 in range(0, K, SLOTS)",
            "for q0 in range(0, SLOTS, SLOTS)",
        ),
        "ranks of the span are counted as rows": ("end = last * RANK", "end = last"),
    },
    "dropout.py": {
        "the row is no part of the counter": ("zero + low, zero + high", "zero, zero + high"),
        "the column is no part of the counter": (
            "counter = column.to(tl.uint32)",
            "counter = column.to(tl.uint32) * 0",
        ),
        "row and column are swapped": ("counter, zero + low,", "zero + low, counter,"),
        "the other entries are dropped": (">= p_drop", "< p_drop"),
        "what is kept is not scaled": ("/ (1 - p_drop)", ""),
        "what is there is overwritten": ("if ONTO:", "if False:"),
        "strides are swapped": ("*x.stride()", "*x.stride()[::-1]"),
        "channels beyond the last are written": ("inside = column < columns", "inside = column < columns + 1"),
        "the sum is rounded before": (
            "x.to(tl.float32) / (1 - p_drop)",
            "(x.to(tl.float32) / (1 - p_drop)).to(x.dtype).to(tl.float32)",
        ),
    },
    "fused.py": {
        "x is read beyond its columns": ("mask=i[None, :] < inner - start", "mask=i[None, :] < inner"),
        "V is read beyond its columns": ("mask=i[None, :] < WIDTH - start", "mask=i[None, :] < WIDTH"),
        "the update is added once": ("range(0, WIDTH, BLOCK_I)", "range(0, BLOCK_I, BLOCK_I)"),
        "rows stay at their first columns": ("x_tile += BLOCK_I", "x_tile += 0"),
        "the bias is left out": ("if bias_ptr is not None:", "if False:"),
        "rows beyond the last are written": ("mask=(t < rows)[:, None]", "mask=(t < rows + 1)[:, None]"),
        "features beyond the last are written": ("(o < features)[None, :]", "(o < features + 1)[None, :]"),
        "the last band is as high as the others": ("tl.minimum(down - band * _TOGETHER, _TOGETHER)", "_TOGETHER"),
        "strides of the weight are swapped": ("*weight.stride()", "*weight.stride()[::-1]"),
        "columns of x may lie apart": ("x if x.stride(1) == 1 else x.contiguous()", "x"),
    },
    "fold_forward.py": {
        "ties go to the last expert": ("(e[None, :] < e[:, None])", "(e[None, :] > e[:, None])"),
        "NaN ranks below every number": (
            'key = tl.where(logits != logits, float("inf"), logits)',
            'key = tl.where(logits != logits, float("-inf"), logits)',
        ),
        "a task that does not exist is read": ("tl.where(known, task, 0) * width", "task * width"),
        "an expert that is not selected counts": ("wanted = selected[:, None] & ", "wanted = exists[:, None] & "),
    },
    "fold_backward.py": {
        "a saturated router's gradient is rounded": (
            "others = tl.sum(tl.where(selected, 0.0, probability), 0)",
            "others = 1 - share",
        ),
        "embeddings of other tasks get the gradient": ("g, g < num_groups) == task)", "g, g < num_groups) >= task)"),
        "groups after the first block are dropped": (
            "range(0, num_groups, BLOCK_G)",
            "range(0, tl.minimum(num_groups, BLOCK_G), BLOCK_G)",
        ),
    },
}


def interleaves(kernels: ModuleType) -> Iterator[None]:
    for name in ("the paper's scales", "more slots than a block", "transposed", "strided"):
        yield check_interleave(kernels, FACTORS[name])
        yield check_gather(kernels, FACTORS[name])


def cores(kernels: ModuleType) -> Iterator[None]:
    kernels._SPAN = 16
    for name in ("strange and inactive", "runs", "more slots than a block", "inactive, one id a row"):
        yield check_core(kernels, CORES[name])
    yield check_core(kernels, SPANS["one id a row"])
    yield check_core(kernels, Core(rows=14, rank=6, scales=(2,)))  # a span of more items than a block


def dropouts(kernels: ModuleType) -> Iterator[None]:
    for name in ("strided", "sliced, fp16", "onto fp16"):
        yield check_dropout(kernels, DROPOUTS[name])


def products(kernels: ModuleType) -> Iterator[None]:
    kernels.candidates = lambda rows: [SMALL_TILE]
    for name in ("two bands of rows", "many columns", "strided weight", "transposed rows"):
        yield check_fused(kernels, FUSED[name])


def folds(kernels: ModuleType) -> Iterator[None]:
    name = "fold" if hasattr(kernels, "fold") else "fold_backward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, name, getattr(kernels, name))
        for case in (SaturatedFoldCase(1), FoldCase(9)):
            yield assert_matches_definition(case, fold_tasks)
        yield assert_ties_go_to_the_first(fold_tasks)
        yield assert_nan_shows(FoldCase(7, 3), fold_tasks)
        yield assert_unselected_experts_are_not_read(fold_tasks)
        yield assert_unknown_tasks_show(3, fold_tasks)
        yield assert_matches_definition(ManyGroupsFoldCase(), fold_tasks)


CHECKS: dict[str, Callable[[ModuleType], Iterator[None]]] = {
    "interleave.py": interleaves,
    "core.py": cores,
    "dropout.py": dropouts,
    "fused.py": products,
    "fold_forward.py": folds,
    "fold_backward.py": folds,
}


def with_text(file: str, target: Path, right: str, wrong: str) -> ModuleType:
    """A kernels' module with some text replaced, imported under a name of its own."""
    source = (Path(fold.__file__).parent / file).read_text()
    assert right in source, f"{file} no longer holds the text to replace"
    path = target / file
    path.write_text(source.replace(right, wrong))
    name = f"{fold.__package__}._planted"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def run_checks(file: str, module: ModuleType) -> None:
    with traced() as trace:
        for _ in CHECKS[file](module):
            trace.assert_written_once()


@pytest.mark.parametrize("file", CHECKS)
def test_the_checks_pass_without_an_error(file: str, tmp_path: Path) -> None:
    run_checks(file, with_text(file, tmp_path, "", ""))


@pytest.mark.parametrize(("file", "what"), [(file, what) for file, mutants in MUTANTS.items() for what in mutants])
def test_a_planted_error_is_noticed(file: str, what: str, tmp_path: Path) -> None:
    module = with_text(file, tmp_path, *MUTANTS[file][what])
    torch.manual_seed(0)
    with pytest.raises(Exception) as noticed:
        run_checks(file, module)
    assert not isinstance(noticed.value, (ImportError, AttributeError, NameError, SyntaxError)), noticed.value
    print(f"{what}: {noticed.value}")
