"""What ``make demo`` runs: four tasks, one adapter, and proof that it learned, reloads and merges.

It trains on the embedded sentiment tasks with the embedded MiniLM, then starts a fresh process that reloads the
adapter, scores it again and merges every task into the weights. The exit code is 0 only if everything holds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .extras import train_extra

with train_extra("ept.demo"):
    from rich.console import Console

    from . import train
    from .data import TaskData, load_tasks
    from .files import read_json
    from .training.collator import evaluation_rows, make_collator
    from .training.evaluate import evaluate_tasks
    from .training.report import RESULT_STAGES, quieten_libraries
    from .training.run import METRICS_FILE, PICTURE_FOLDER
    from .training.saving import load_trained

# Sized for two CPU cores: a few minutes in all.
STEPS, BATCH_SIZE, MAX_LENGTH, EVAL_ROWS = 150, 16, 32, 200
MARGIN = 0.05  # headline metric above the baseline that counts as having learned
METRIC_TOLERANCE = 1e-6
LOGIT_TOLERANCE = 1e-4  # merged against unmerged, fp32, relative to the largest logit
_MERGED_ROWS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if all checks hold, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m ept.demo", description="Train, reload, merge, check.")
    parser.add_argument("--output", default="runs/demo", help="folder to write to (default: runs/demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS})")
    parser.add_argument("--verify", action="store_true", help="only check the run in --output")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"argument --steps: must be an integer >= 1, got {options.steps}")
    console = Console()
    quieten_libraries()
    if options.verify:
        return 0 if _verify(Path(options.output), console) else 1
    return _demo(Path(options.output), options.steps, console)


def _demo(output: Path, steps: int, console: Console) -> int:
    start = time.monotonic()
    console.rule("1. train on four tasks at once")
    console.print(f"{steps} steps of {BATCH_SIZE} samples", highlight=False)
    recipe = {"--max-steps": steps, "--batch-size": BATCH_SIZE, "--max-length": MAX_LENGTH, "--eval-limit": EVAL_ROWS}
    arguments = [str(part) for option in recipe.items() for part in option]
    train.main(["--output", str(output), "--overwrite", "--save-steps", "0", *arguments])
    console.rule("2. what it learned")
    learned = _check_learning(read_json(output / METRICS_FILE), console)
    console.rule("3. reload in a fresh process, merge")
    fresh = subprocess.run([sys.executable, "-m", "ept.demo", "--verify", "--output", str(output)], check=False)
    passed = learned and fresh.returncode == 0
    console.rule("demo passed" if passed else "demo FAILED")
    console.print(f"pictures: {output / PICTURE_FOLDER}", soft_wrap=True, highlight=False)
    console.print(f"{time.monotonic() - start:.0f} s in all", highlight=False)
    return 0 if passed else 1


def _check_learning(metrics: dict[str, Any], console: Console) -> bool:
    """Whether every task's headline metric is clearly above its baseline."""
    passed = True
    for name, task in metrics["tasks"].items():
        headline = task["headline"]
        baseline, _, after = (task[stage][headline] for stage in RESULT_STAGES)
        passed &= _say(
            console,
            after >= baseline + MARGIN,
            f"{name}: {headline} {after:.3f}, baseline {baseline:.3f} (at least {MARGIN} above it is asked for)",
        )
    return passed


def _verify(output: Path, console: Console) -> bool:
    """In the process that calls it: reload the adapter, score it again, merge every task."""
    metrics = read_json(output / METRICS_FILE)
    settings = metrics["settings"]
    model, tokenizer, specs = load_trained(output)
    tasks = load_tasks(settings["data"], [spec.name for spec in specs])
    scored = evaluate_tasks(model, tokenizer, tasks, max_length=settings["max_length"], limit=settings["eval_limit"])
    difference = max(
        abs(value - metrics["tasks"][name]["after"][metric])
        for name, found in scored.items()
        for metric, value in found.items()
    )
    passed = _say(
        console,
        difference <= METRIC_TOLERANCE,
        f"reloaded adapter scores the same: largest difference {difference:.1e} (tolerance {METRIC_TOLERANCE:.0e})",
    )
    for task_id, task in enumerate(tasks):
        passed &= _check_merge(model, tokenizer, task, task_id, settings["max_length"], console)
    return passed


@torch.no_grad()
def _check_merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskData,
    task_id: int,
    max_length: int,
    console: Console,
) -> bool:
    """Whether merging one task leaves its logits as they are, and unmerging restores them bit-identically."""
    rows = evaluation_rows(task, task_id, _MERGED_ROWS)
    collate = make_collator("encoder", tokenizer, {task_id: task.spec}, max_length=max_length)
    batch = collate([rows[i] for i in range(len(rows))])
    before = model(**batch).logits
    tuner: Any = model.base_model
    tuner.merge_adapter(task=task.spec.name)
    merged = model(**batch).logits
    tuner.unmerge_adapter()
    after = model(**batch).logits
    real = torch.isfinite(before)  # labels that the task does not have are -inf
    largest = before[real].abs().max().item()
    difference = (merged[real] - before[real]).abs().max().item() / largest
    restored = torch.equal(before, after)
    return _say(
        console,
        difference <= LOGIT_TOLERANCE and restored,
        f"{task.spec.name}: merged and unmerged logits differ by {difference:.1e} of the largest "
        f"(tolerance {LOGIT_TOLERANCE:.0e}); unmerging restores them bit-identically: {restored}",
    )


def _say(console: Console, holds: bool, text: str) -> bool:
    console.print(
        f"[{'green' if holds else 'red'}]{'ok    ' if holds else 'FAILED'}[/] {text}", highlight=False, soft_wrap=True
    )
    return holds


if __name__ == "__main__":
    sys.exit(main())
