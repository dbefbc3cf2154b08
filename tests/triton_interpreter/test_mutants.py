"""Plants errors in the Triton kernels, one at a time, and expects ``triton_probe.py`` to notice each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ept_kernels

TESTS = Path(__file__).parents[1]

#: What is wrong, where, and the text that says it instead.
MUTANTS = {
    "channels beyond the last are read": (
        "shrink.py",
        "mask=row_exists[:, None] & (ahead < features)[None, :]",
        "mask=row_exists[:, None] & (ahead < features + 64)[None, :]",
    ),
    "channel offsets overflow": ("shrink.py", "ahead[None, :].to(tl.int64) *", "ahead[None, :] *"),
    "a row of NaN counts as zero": ("shrink.py", "(v != 0).to(tl.int32)", "(tl.abs(v) > 0).to(tl.int32)"),
    "kernels are not transposed": (
        "shrink.py",
        "1 if TRANSPOSE else SCALES[s]",
        "SCALES[s] if TRANSPOSE else SCALES[s]",
    ),
    "the group beyond the last row is read": ("shrink.py", "tl.minimum(rows, end - 1)", "tl.minimum(rows, end)"),
    "rank blocks share their bits": (
        "shrink.py",
        "active_ptr + rank_block.to(tl.int64) * rows_total + rows",
        "active_ptr + rows",
    ),
    "blocks that mix groups skip as if they had one": (
        "shrink.py",
        "SKIP=skip and uses is None and rows.aligned",
        "SKIP=skip and uses is None",
    ),
    "surplus ranks are stored": ("tiles.py", "exists = (p < RANK_BLOCK) & ", "exists = "),
    "the slice is read beyond its end": ("tiles.py", "(j[None, :] * K < features)", "(j[None, :] < features)"),
    "slots are shifted": (
        "tiles.py",
        "own = slot[None, :, None] == (c % K)",
        "own = slot[None, :, None] == ((c + 1) % K)",
    ),
    "rows are units of one row": ("plan.py", "if self.aligned else self.segment", "if self.aligned else 1"),
    "a block is skipped if one row is zero": ("expand.py", "tl.max((bits >> s) & 1, 0)", "tl.min((bits >> s) & 1, 0)"),
    "rank blocks after the first are dropped": (
        "expand.py",
        "range(0, rank, RANK_BLOCK)",
        "range(0, RANK_BLOCK, RANK_BLOCK)",
    ),
    "what is there is overwritten": ("expand.py", "if ACCUMULATE:", "if False:"),
    "the last strip is as high as the others": (
        "linear.py",
        "tl.minimum(row_blocks - strip * GROUP_T, GROUP_T)",
        "tl.minimum(GROUP_T, GROUP_T)",
    ),
    "inner channels are not masked": (
        "linear.py",
        "channel_exists = i < inner",
        "channel_exists = i < inner + BLOCK_I",
    ),
    "a span ends after the last row": ("factor_grad.py", "tl.minimum(start + span, rows_total)", "start + span"),
    "gradient slots are shifted": (
        "factor_grad.py",
        "(channels % SCALES[s])[None",
        "((channels + 1) % SCALES[s])[None",
    ),
    "padded slots are summed": ("reduce.py", "inside = (q < SCALES[s])[None, :] & ", "inside = "),
    "spans after the first are dropped": (
        "reduce.py",
        "for part in range(spans):",
        "for part in range(tl.minimum(spans, 1)):",
    ),
    "kernels' gradient of later rank blocks is dropped": (
        "reduce.py",
        "for block in range(rank_blocks):",
        "for block in range(tl.minimum(rank_blocks, 1)):",
    ),
    "zero kernels get no gradient": ("backend.py", '"skip": not need_folded', '"skip": True'),
    "partial sums are half": (
        "factor_grad.py",
        "dtype=torch.float32, device=given.device",
        "dtype=torch.float16, device=given.device",
    ),
    "a group that does not exist is read": ("shrink.py", "group = tl.where(known, group, 0)", "group = group + 0"),
    "a block uses what its first row uses": (
        "shrink.py",
        "used = tl.max(tl.load(uses_ptr + group * len(SCALES) + s).to(tl.int32), 0)",
        "used = tl.sum(tl.where(tl.arange(0, BLOCK_T) == 0, tl.load(uses_ptr + group * len(SCALES) + s), 0), 0)",
    ),
    "V of an inactive scale is not written": ("shrink.py", "elif v_ptr is not None:", "elif False:"),
    "sums that nobody wrote are read": (
        "reduce.py",
        "exists = exists & used_entries",
        "exists = exists | used_entries",
    ),
    "units of a span are summed twice": (
        "factor_grad.py",
        "tl.minimum(part * span + span, rows_total)",
        "rows_total",
    ),
    "bits beyond the span decide": ("factor_grad.py", "mask=t < end, other=0)", "mask=t < 0, other=0)"),
    "the product waits for its first shrink tile only": (
        "single.py",
        "last = tl.minimum(first + BLOCK_T // SHRINK_T, shrink_blocks)",
        "last = tl.minimum(first + 1, shrink_blocks)",
    ),
    "the flag is set without release": ("single.py", 'sem="release"', 'sem="relaxed"'),
    "the flag is polled without acquire": ("single.py", 'sem="acquire"', 'sem="relaxed"'),
    "ties go to the last expert": ("fold_forward.py", "(e[None, :] < e[:, None])", "(e[None, :] > e[:, None])"),
    "NaN ranks below every number": (
        "fold_forward.py",
        'key = tl.where(logits != logits, float("inf"), logits)',
        'key = tl.where(logits != logits, float("-inf"), logits)',
    ),
    "a task that does not exist is read": ("fold_forward.py", "tl.where(known, task, 0) * width", "task * width"),
    "an expert that is not selected counts": (
        "fold_forward.py",
        "wanted = selected[:, None] & ",
        "wanted = exists[:, None] & ",
    ),
    "a saturated router's gradient is rounded": (
        "fold_backward.py",
        "others = tl.sum(tl.where(selected, 0.0, probability), 0)",
        "others = 1 - share",
    ),
    "embeddings of other tasks get the gradient": (
        "fold_backward.py",
        "g, g < num_groups) == task)",
        "g, g < num_groups) >= task)",
    ),
    "groups after the first block are dropped": (
        "fold_backward.py",
        "range(0, num_groups, BLOCK_G)",
        "range(0, tl.minimum(num_groups, BLOCK_G), BLOCK_G)",
    ),
}


def probe(package: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join(str(each) for each in (package.parent, TESTS, TESTS / "triton"))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, TESTS / "triton_probe.py"], env=environment, capture_output=True, text=True, timeout=900
    )


def copied(target: Path) -> Path:
    return Path(shutil.copytree(Path(ept_kernels.__file__).parent, target / "ept_kernels"))


@pytest.fixture(autouse=True)
def only_when_asked() -> None:
    if os.environ.get("EPT_SLOW_TESTS") != "1":
        pytest.skip("half a minute for each planted error: set EPT_SLOW_TESTS=1")


@pytest.mark.slow
def test_the_probe_passes_without_an_error(tmp_path: Path) -> None:
    result = probe(copied(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", MUTANTS)
def test_a_planted_error_is_noticed(what: str, tmp_path: Path) -> None:
    file, right, wrong = MUTANTS[what]
    package = copied(tmp_path)
    source = (package / "triton" / file).read_text()
    assert right in source, f"{file} no longer holds the text to replace"
    (package / "triton" / file).write_text(source.replace(right, wrong))
    result = probe(package)
    assert result.returncode == 1, f"nothing noticed it: {result.stdout}{result.stderr}"
    print(f"{what}: {result.stdout.strip()}")
