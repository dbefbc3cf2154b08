"""Does EPT learn at its default recipe what others learn at their own, in as many steps? One run, one JSON line.

    python benchmarks/quality/recipe.py --data FOLDER --tasks cola,mrpc,rte,stsb,sst2 --method ept
    python benchmarks/quality/recipe.py --data FOLDER --tasks cola,mrpc,rte,stsb,sst2 --method lora --lr 5e-4
    python benchmarks/quality/recipe.py --data FOLDER --tasks mrpc,stsb,sst2 --steps 400 --set task_similarity=0.75
    python benchmarks/quality/recipe.py --show

All methods see the same model, targets, data order, heads, steps and schedule. Trainer, sampler, metrics and each
method's defaults are those of ``ept-train``; LoRA is PEFT's, with the rank and scaling of EPT's defaults.
A task with a labelled test split is scored on that, too; always in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from training_run import mean_and_error, where
from transformers import set_seed

import ept
from ept import models
from ept.data import load_tasks
from ept.training import EPTTrainer, EPTTrainingArguments, load_base, mean_headline
from ept.training.evaluate import evaluate_tasks
from ept.training.multitask import base_model
from ept.training.options import SYSTEMS
from ept.training.report import quieten_libraries

RESULTS = Path(__file__).parents[1] / "results" / "recipe.jsonl"


class RecordingTrainer(EPTTrainer):
    """Keeps every sample's loss by task and quarter of the run: less noisy than scores of a few hundred rows."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sample_losses: dict[int, list[list[torch.Tensor]]] = defaultdict(lambda: [[], [], [], []])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        quarter = min(4 * self.state.global_step // self.args.max_steps, 3)
        with torch.no_grad():
            losses = base_model(model).sample_losses(outputs.logits, inputs["labels"], inputs["task_ids"])
        for task, value in zip(inputs["task_ids"].tolist(), losses, strict=True):
            self.sample_losses[task][quarter].append(value)
        return (loss, outputs) if return_outputs else loss

    def losses_by_task(self) -> dict[str, list[float]]:
        """Mean training loss of each task in each quarter of the run."""
        names = [spec.name for spec in self._specs.values()]
        return {
            name: [
                round(torch.stack(values).mean().item(), 4) if values else None for values in self.sample_losses[task]
            ]
            for task, name in enumerate(names)
        }

    def gradient_norms(self) -> dict[str, float]:
        """Median of the logged gradient norms (before clipping), and the share that was clipped."""
        norms = [entry["grad_norm"] for entry in self.state.log_history if "grad_norm" in entry]
        limit = self.args.max_grad_norm
        return {
            "median": round(statistics.median(norms), 4),
            "clipped": round(sum(norm > limit > 0 for norm in norms) / len(norms), 3),
        }


def sharing(model: PeftModel) -> dict[str, float]:
    """How alike the tasks are: mean cosine of two embeddings, and the weight that two tasks put on the same experts."""
    embeddings = torch.nn.functional.normalize(ept.task_embeddings(model).float(), dim=-1)
    first, second = torch.triu_indices(len(embeddings), len(embeddings), 1)
    overlaps = []
    for index, gates in ept.routing(model).values():
        dense = torch.zeros(len(embeddings), int(index.max()) + 1).scatter(1, index.cpu(), gates.float().cpu())
        overlaps.append(torch.minimum(dense[first], dense[second]).sum(1).mean())
    cosines = (embeddings @ embeddings.T)[first, second]
    return {"cosine": round(cosines.mean().item(), 3), "experts": round(torch.stack(overlaps).mean().item(), 3)}


def setting(text: str) -> tuple[str, Any]:
    """``name=value`` of ``--set``, the value in JSON."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be NAME=JSON, got {text!r}") from error


def run(options: argparse.Namespace) -> dict[str, object]:
    """Train and score one method; the record that is kept."""
    tasks = load_tasks(options.data, options.tasks.split(","))
    system = SYSTEMS[options.method]
    for_adapter = {name: value for name, value in options.set if system.has(name)}
    for_training = {name: value for name, value in options.set if not system.has(name)}
    set_seed(options.seed)
    model, tokenizer, _ = load_base("minilm", [task.spec for task in tasks])
    shared = {"target_modules": models.target_modules(model), "modules_to_save": ["heads"]}
    config = system.make_config([task.spec.name for task in tasks], **shared, **for_adapter)
    adapted = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = EPTTrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            max_length=64,
            seed=options.seed,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            learning_rate=system.learning_rate if options.lr is None else options.lr,
            **for_training,
        )
        sharing_at_start = sharing(adapted) if options.method == "ept" else None
        trainer = RecordingTrainer(adapted, arguments, tasks=tasks, processing_class=tokenizer)
        trainer.train()
        scores = trainer.evaluate_by_task()
        tested = [dataclasses.replace(task, validation=task.test) for task in tasks if task.test is not None]
        tests = evaluate_tasks(adapted, tokenizer, tested, max_length=64) if tested else {}
    specs = [task.spec for task in tasks]
    return {
        "method": options.method,
        "lr": arguments.learning_rate,
        "steps": options.steps,
        "seed": options.seed,
        "bf16": options.bf16,
        "set": dict(options.set),
        "trainable": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "scores": {spec.name: scores[spec.name][spec.metrics[0]] for spec in specs},
        "metrics": {spec.name: spec.metrics[0] for spec in specs},
        "rows": {task.spec.name: len(task.validation) for task in tasks},
        "test": {spec.name: tests[spec.name][spec.metrics[0]] for spec in specs if spec.name in tests},
        "validation_loss": {spec.name: round(scores[spec.name]["loss"], 4) for spec in specs},
        "train_loss": trainer.losses_by_task(),
        "gradient_norm": trainer.gradient_norms(),
        "sharing": None if sharing_at_start is None else [sharing_at_start, sharing(adapted)],
        "mean": mean_headline(specs, scores),
        **where(arguments.device),
    }


def show() -> None:
    """Print the kept records as a markdown table; runs that differ in their seed only are also averaged."""
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for record in records:
        record["scores"] |= {f"{name} (test)": score for name, score in record.get("test", {}).items()}
    names = sorted({name for record in records for name in record["scores"]})
    heads = ["method", "lr", "steps", "dtype", "other settings", "seed", *names, "mean"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    alike = defaultdict(list)
    for record in records:
        settings = " ".join(f"{name}={value}" for name, value in record.get("set", {}).items())
        dtype = "bf16" if record.get("bf16") else "fp32"
        key = (record["method"], f"{record['lr']:g}", str(record["steps"]), dtype, settings)
        scores = [record["scores"].get(name, math.nan) for name in names] + [record["mean"]]
        alike[key, tuple(record["scores"])].append(scores)
        _print_row(*key, str(record["seed"]), *(_shown(f"{score:.3f}") for score in scores))
    for (key, _), runs in alike.items():
        if len(runs) > 1:
            columns = [mean_and_error(column) for column in zip(*runs, strict=True)]
            cells = [_shown(f"{mean:.3f} ± {error:.3f}") for mean, error in columns]
            _print_row(*key, f"mean of {len(runs)}", *cells)


def _print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def _shown(number: str) -> str:
    """A task that a run did not have is left blank."""
    return "" if number.startswith("nan") else number


def main() -> None:
    parser = argparse.ArgumentParser(description="EPT and other methods at equal steps.")
    parser.add_argument("--data", help="folder with an index.json, sentiment, or hub:ID")
    parser.add_argument("--tasks", default="cola,mrpc,rte,stsb,sst2")
    parser.add_argument("--method", choices=tuple(SYSTEMS), default="ept")
    parser.add_argument("--lr", type=float, help="default: the method's")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16, all methods alike")
    parser.add_argument(
        "--set",
        action="append",
        type=setting,
        default=[],
        metavar="NAME=JSON",
        help="a field of the method's config or of EPTTrainingArguments; may be repeated",
    )
    parser.add_argument("--show", action="store_true", help="print what earlier runs found")
    options = parser.parse_args()
    if options.show:
        show()
        return
    if options.data is None:
        parser.error("argument --data is missing")
    known = {field.name for field in dataclasses.fields(EPTTrainingArguments)}
    unknown = [name for name, _ in options.set if name not in known and not SYSTEMS[options.method].has(name)]
    if unknown:
        parser.error(f"argument --set: {unknown[0]!r} is no field of the config of --method {options.method}")
    quieten_libraries()
    record = run(options)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
