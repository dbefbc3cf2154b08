"""One training run from settings to files: adapter, metrics, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from .. import introspection, models, plots
from ..config import ContrastiveConfig
from ..data import TaskData
from ..files import clear_leftovers, write_atomically, write_json
from .arguments import EPTTrainingArguments
from .checkpointing import clear_unfinished, newest_checkpoint, remove_checkpoint
from .evaluate import baselines
from .multitask import adapter_config, trained_parameters
from .options import RunSettings
from .report import device_name, results_table, versions, write_metrics
from .saving import load_base, save_trained
from .trainer import EPTTrainer

SETTINGS_FILE = "settings.json"
METRICS_FILE = "metrics.json"
CHECKPOINT_FOLDER = "checkpoints"
PICTURE_FOLDER = "pictures"

#: PEFT's names for the kinds of model.
TASK_TYPES = {"encoder": None, "seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class RunResult:
    """What a run found (``{task: {metric: value}}`` each) and the files it wrote, by what they are."""

    before: Results
    after: Results
    baseline: Results
    files: dict[str, Path]


def make_adapted(settings: RunSettings, tasks: Sequence[TaskData]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model with a new adapter of the chosen method, and its tokenizer; a pure function of the settings.

    Raises:
        ept.models.ModelError: the model cannot be had.
        ValueError: the model cannot learn a task, or the adapter does not fit the model.
    """
    set_seed(settings.seed)
    model, tokenizer, kind = load_base(settings.model, [task.spec for task in tasks])
    targets = settings.target_modules
    config = settings.system.make_config(
        [task.spec.name for task in tasks],
        target_modules=models.target_modules(model) if targets is None else list(targets),
        modules_to_save=["heads"] if kind == "encoder" else None,
        task_type=TASK_TYPES[kind],
        **settings.config_options(),
    )
    return get_peft_model(model, config, revision=models.split_revision(settings.model)[1]), tokenizer


def training_arguments(settings: RunSettings) -> EPTTrainingArguments:
    """The trainer's arguments for these settings."""
    return EPTTrainingArguments(
        output_dir=str(Path(settings.output) / CHECKPOINT_FOLDER),
        **settings.arguments(),
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def train(
    settings: RunSettings,
    tasks: Sequence[TaskData],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> RunResult:
    """Train, score before and after, and write everything below ``settings.output``.

    ``model`` is freshly made by `make_adapted`. Files of an earlier run are replaced one by one as the new ones are
    ready. In a distributed run every process trains and only the first one writes and prints; the others' results have
    no files.

    Raises:
        ValueError: launched with FSDP.
    """
    output = Path(settings.output)
    trainer = EPTTrainer(model, training_arguments(settings), tasks=tasks, processing_class=tokenizer)
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "FSDP shards the model that this run saves, merges and draws: launch it with torchrun (data parallel), or "
            "train with ept.training.EPTTrainer, whose save_model gathers the adapter"
        )
    parameters = {**trained_parameters(model), "all": sum(p.numel() for p in model.parameters())}
    device = device_name(trainer.args.device)
    writes = trainer.is_world_process_zero()
    if writes:
        clear_leftovers(output)
        clear_unfinished(output / CHECKPOINT_FOLDER)
        if not settings.resume:
            for old in (output / CHECKPOINT_FOLDER).glob("checkpoint-*"):
                remove_checkpoint(old)
        write_json(output / SETTINGS_FILE, {**asdict(settings), "processes": trainer.args.world_size})
    if writes and not settings.quiet:
        _print_start(console, device, parameters, tasks)
    baseline, before = baselines(tasks, settings.eval_limit), trainer.evaluate_by_task()
    checkpoint = newest_checkpoint(output / CHECKPOINT_FOLDER) if settings.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    after = trainer.evaluate_by_task()
    history = trainer.state.log_history
    trainer.accelerator.end_training()
    if not writes:
        return RunResult(before, after, baseline, {})
    specs = [task.spec for task in tasks]
    files = {
        "adapter": save_trained(output, model, tokenizer, specs, base_model=settings.model),
        "metrics": write_metrics(
            output / METRICS_FILE,
            specs,
            before=before,
            after=after,
            baseline=baseline,
            settings=asdict(settings),
            device=device,
            parameters=parameters,
            history=history,
        ),
        "pictures": draw(output / PICTURE_FOLDER, model, history),
    }
    console.print(results_table(specs, before, after, baseline))
    for what, path in files.items():
        console.print(f"{what:9} {path}", soft_wrap=True, highlight=False)
    return RunResult(before, after, baseline, files)


def draw(folder: Path, model: PeftModel, history: Sequence[Mapping[str, float]]) -> Path:
    """Draw the loss curves and, where the method has them, expert use and the map of the task embeddings.

    Replaces ``folder``.
    """
    config = adapter_config(model)

    def write(new: Path) -> None:
        plots.loss_curves(history, new / "loss.png")
        if config is None:
            return
        names, adapters = introspection.task_names(model), introspection.adapters(model)
        adapter = next(iter(adapters.values()))
        if adapter.expert_labels is not None:
            labels = {layer: part.expert_labels or () for layer, part in adapters.items()}
            path = new / "expert_use.png"
            plots.expert_use(introspection.routing(model), labels, names, path, kind=adapter.expert_kind)
        if len(names) > 1 and isinstance(config, ContrastiveConfig) and adapter.shared.routes:
            plots.task_map(introspection.task_embeddings(model), names, new / "task_embeddings.png")

    return write_atomically(folder, write)


def _print_start(console: Console, device: str, parameters: Mapping[str, int], tasks: Sequence[TaskData]) -> None:
    found = versions()
    shown = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers", "peft"))
    console.print(f"device {device}; {shown}", highlight=False, soft_wrap=True)
    trained = {name: count for name, count in parameters.items() if name != "all"}
    total, share = sum(trained.values()), sum(trained.values()) / parameters["all"]
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    console.print(
        f"trainable {total:,} of {parameters['all']:,} ({share:.2%}): {parts}", highlight=False, soft_wrap=True
    )
    rows = ", ".join(f"{task.spec.name} {len(task.train):,} + {len(task.validation):,}" for task in tasks)
    console.print(f"rows (train + validation): {rows}", highlight=False, soft_wrap=True)
