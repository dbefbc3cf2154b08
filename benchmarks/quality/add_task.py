"""A task added later: what it reaches when its embedding and head alone train, and what the others lose (nothing).

    python benchmarks/quality/add_task.py --bf16                # the embedded data, MiniLM, the last task added
    python benchmarks/quality/add_task.py --bf16 --data FOLDER --added NAME

``together`` trains all tasks from the start. The others start from one adapter that was trained on the other tasks,
with as many steps a task (``--added-steps`` for the new one): ``head only`` keeps the new task's embedding at the mean
of the others, ``embedding and head`` trains it, and ``new kernels`` adds experts of the task's own to every layer
(``--new-kernels``). ``old tasks`` are the others' scores before and after; their logits are compared bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from life import batches, build_parser, new_model, parse, score, train, write
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ept.data import TaskData
from ept.training import add_task
from ept.training.multitask import ids_of_tasks


@torch.no_grad()
def logits(
    options: argparse.Namespace, model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: TaskData
) -> list[Tensor]:
    """A task's logits of a hundred validation rows."""
    model.eval()
    (task_id,) = ids_of_tasks(model, [task])
    found = []
    for batch in batches(options, model, tokenizer, task, task_id, 100):
        batch.pop("labels")
        found.append(model(**batch).logits[:, : task.spec.num_labels])
    return found


def main() -> int:
    parser = build_parser("A task that is added to a trained adapter.", "add_task.json")
    parser.add_argument("--added", help="the task that is added (default: the last)")
    parser.add_argument("--added-steps", type=int, help="of the new task (default: its share of --steps)")
    parser.add_argument("--new-kernels", type=int, nargs="+", default=[8, 8], help="kernel sizes of its own experts")
    options, tasks = parse(parser, 3)
    names = [task.spec.name for task in tasks]
    added = options.added or names[-1]
    if added not in names:
        parser.error(f"argument --added: must be one of {', '.join(names)}, got {added!r}")
    options.added = added
    new = next(task for task in tasks if task.spec.name == added)
    others = [task for task in tasks if task is not new]

    together, tokenizer = new_model(options, tasks)
    train(options, together, tokenizer, tasks, options.steps)
    scores = {"together": score(options, together, tokenizer, new)}
    first, _ = new_model(options, others)
    share = max(1, options.steps // len(tasks))
    options.added_steps = options.added_steps or share
    train(options, first, tokenizer, others, share * len(others))
    before = {task.spec.name: score(options, first, tokenizer, task) for task in others}
    old_logits = [row for task in others for row in logits(options, first, tokenizer, task)]
    trained = {}
    for name in ("head only", "embedding and head", "new kernels"):
        model = copy.deepcopy(first)
        add_task(model, new.spec, new_kernels=options.new_kernels if name == "new kernels" else ())
        if name == "head only":
            model.base_model.ept_task_tables["default"].weight_added.requires_grad_(False)
        train(options, model, tokenizer, [new], options.added_steps)
        scores[name] = score(options, model, tokenizer, new)
        trained[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    after = {task.spec.name: score(options, model, tokenizer, task) for task in others}
    new_logits = [row for task in others for row in logits(options, model, tokenizer, task)]
    results = {
        "added": {"task": added, "scores": scores, "trained parameters": trained, "steps": options.added_steps},
        "old tasks": {
            "together": {task.spec.name: score(options, together, tokenizer, task) for task in others},
            "before": before,
            "after": after,
            "bit-equal": all(torch.equal(*pair) for pair in zip(old_logits, new_logits, strict=True)),
        },
    }
    write(options, model, tasks, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
