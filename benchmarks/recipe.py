"""Does EPT learn at its default recipe what LoRA learns at its own, in as many steps? One run, one JSON line.

    python benchmarks/recipe.py --data FOLDER --tasks cola,mrpc,rte,stsb,sst2 --method ept
    python benchmarks/recipe.py --data FOLDER --tasks cola,mrpc,rte,stsb,sst2 --method lora --lr 1e-3
    python benchmarks/recipe.py --show

Both methods see the same model, targets, data order, heads, steps and schedule. Trainer, sampler and metrics are those
of ``ept-train``; LoRA is PEFT's, with the rank and scaling of EPT's defaults.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

import ept
from ept import models
from ept.data import load_tasks
from ept.training import EPTTrainer, EPTTrainingArguments, load_base, mean_headline
from ept.training.console import quieten_libraries
from ept.training.report import device_name, versions

RESULTS = Path(__file__).parent / "results" / "recipe.jsonl"


def run(options: argparse.Namespace) -> dict[str, object]:
    """Train and score one method; the record that is kept."""
    tasks = load_tasks(options.data, options.tasks.split(","))
    set_seed(options.seed)
    model, tokenizer, _ = load_base("minilm", [task.spec for task in tasks])
    shared = {"target_modules": models.target_modules(model), "modules_to_save": ["heads"]}
    if options.method == "ept":
        config = ept.EPTConfig(task_names=[task.spec.name for task in tasks], **shared)
    else:
        config = LoraConfig(r=8, lora_alpha=32, **shared)
    adapted = get_peft_model(model, config)
    rate = {} if options.lr is None else {"learning_rate": options.lr}
    with tempfile.TemporaryDirectory() as folder:
        arguments = EPTTrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            max_length=64,
            seed=options.seed,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            **rate,
        )
        trainer = EPTTrainer(adapted, arguments, tasks=tasks, processing_class=tokenizer)
        trainer.train()
        scores = trainer.evaluate_by_task()
    specs = [task.spec for task in tasks]
    return {
        "method": options.method,
        "lr": arguments.learning_rate,
        "steps": options.steps,
        "seed": options.seed,
        "trainable": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "scores": {spec.name: scores[spec.name][spec.metrics[0]] for spec in specs},
        "metrics": {spec.name: spec.metrics[0] for spec in specs},
        "rows": {task.spec.name: len(task.validation) for task in tasks},
        "mean": mean_headline(specs, scores),
        "device": device_name(arguments.device),
        "versions": {name: version for name, version in versions().items() if name != "platform"},
    }


def show() -> None:
    """Print the kept records as a markdown table."""
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    names = list(records[0]["scores"])
    print("| method | lr | seed | trainable | " + " | ".join(names) + " | mean |")
    print("|---" * (len(names) + 5) + "|")
    for record in records:
        cells = [record["method"], f"{record['lr']:g}", str(record["seed"]), f"{record['trainable']:,}"]
        cells += [f"{record['scores'][name]:.3f}" for name in names] + [f"{record['mean']:.3f}"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="EPT and LoRA at equal steps.")
    parser.add_argument("--data", help="folder with an index.json, sentiment, or hub:ID")
    parser.add_argument("--tasks", default="cola,mrpc,rte,stsb,sst2")
    parser.add_argument("--method", choices=("ept", "lora"), default="ept")
    parser.add_argument("--lr", type=float, help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print what earlier runs found")
    options = parser.parse_args()
    if options.show:
        show()
        return
    if options.data is None:
        parser.error("argument --data is missing")
    quieten_libraries()
    record = run(options)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
