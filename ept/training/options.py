"""The command line of ``ept-train``: every option, its default and what it may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ept.config import EPTConfig
from ept.training.arguments import EPTTrainingArguments
from ept.training.sampler import TASK_BATCHING


def _default(owner: type, name: str) -> Any:
    return next(entry.default for entry in fields(owner) if entry.name == name)


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run; the recipe's defaults are those of ``EPTTrainingArguments`` and ``EPTConfig``."""

    output: str
    model: str = "minilm"
    data: str = "sentiment"
    tasks: tuple[str, ...] | None = None
    lr: float = _default(EPTTrainingArguments, "learning_rate")
    kernel_lr_ratio: float = _default(EPTTrainingArguments, "kernel_lr_ratio")
    gate_lr_ratio: float = _default(EPTTrainingArguments, "gate_lr_ratio")
    warmup: float = _default(EPTTrainingArguments, "warmup_steps")
    weight_decay: float = _default(EPTTrainingArguments, "weight_decay")
    epochs: float = _default(EPTTrainingArguments, "num_train_epochs")
    max_steps: int | None = None
    batch_size: int = _default(EPTTrainingArguments, "per_device_train_batch_size")
    max_length: int = _default(EPTTrainingArguments, "max_length")
    task_batching: str = _default(EPTTrainingArguments, "task_batching")
    r: int = _default(EPTConfig, "r")
    alpha: float = _default(EPTConfig, "lora_alpha")
    kernel_sizes: tuple[int, ...] = _default(EPTConfig, "kernel_sizes")
    top_k: int = _default(EPTConfig, "top_k")
    task_similarity: float = _default(EPTConfig, "task_similarity")
    contrastive_weight: float = _default(EPTConfig, "contrastive_weight")
    temperature: float = _default(EPTConfig, "temperature")
    init_seed: str = _default(EPTConfig, "init_seed")
    alp_scaling: bool = _default(EPTConfig, "alp_scaling")
    dropout: float = _default(EPTConfig, "lora_dropout")
    target_modules: tuple[str, ...] | None = None
    seed: int = 0
    save_steps: int = 500
    eval_limit: int | None = None
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False


def build_parser() -> argparse.ArgumentParser:
    """The parser; its namespace has exactly the fields of ``RunSettings``."""
    parser = argparse.ArgumentParser(
        prog="ept-train",
        description="Train one EPT adapter on several tasks; write adapter, metrics and pictures.",
    )
    what = parser.add_argument_group("what to train")
    _add(what, "output", "folder to write to", required=True)
    _add(what, "model", "minilm, smollm2, a model directory, or a hub id")
    _add(what, "data", "sentiment, a folder with an index.json, or hub:<dataset id>")
    _add(what, "tasks", "names, separated by commas (default: all)", type=_names)
    recipe = parser.add_argument_group("recipe")
    _add(recipe, "lr", "peak learning rate", type=_number(above=0))
    _add(recipe, "kernel-lr-ratio", "learning rate of the kernels relative to the rest", type=_number(above=0))
    _add(recipe, "gate-lr-ratio", "that of the gates, times the embeddings' width", type=_number(above=0))
    _add(recipe, "warmup", "warm-up steps; below 1: share of all steps", type=_number(least=0))
    _add(recipe, "weight-decay", "AdamW's weight decay", type=_number(least=0))
    _add(recipe, "epochs", "passes over as many samples as all tasks have", type=_number(above=0))
    _add(recipe, "max-steps", "train for this many steps instead of --epochs", type=_integer(1))
    _add(recipe, "batch-size", "samples of a training batch", type=_integer(1))
    _add(recipe, "max-length", "tokens of a row at most", type=_integer(8))
    _add(recipe, "task-batching", "draw the task of every sample, or of every batch", choices=TASK_BATCHING)
    _add(recipe, "seed", "of model, data order and dropout", type=_integer(0))
    adapter = parser.add_argument_group("adapter")
    _add(adapter, "r", "rank of the shared seed", type=_integer(1))
    _add(adapter, "alpha", "the update is scaled by alpha / r", type=_number(above=0))
    _add(adapter, "kernel-sizes", "the pyramid, one size per expert, separated by commas", type=_sizes)
    _add(adapter, "top-k", "experts mixed for a task", type=_integer(1))
    _add(adapter, "task-similarity", "cosine of two task embeddings at the start", type=_number(least=0, below=1))
    _add(adapter, "contrastive-weight", "weight of the contrastive task loss", type=_number(least=0))
    _add(adapter, "temperature", "of the contrastive task loss", type=_number(above=0))
    _add(adapter, "init-seed", "start of the seed's left factor", choices=("gaussian", "zero"))
    _add(adapter, "no-alp-scaling", "leave out the dimension-aware scale", action="store_false", dest="alp_scaling")
    _add(adapter, "dropout", "on the adapter's input", type=_number(least=0, below=1))
    _add(adapter, "target-modules", "module names, separated by commas (default: all in the blocks)", type=_names)
    running = parser.add_argument_group("running")
    _add(running, "save-steps", "steps between checkpoints; 0: none", type=_integer(0))
    _add(running, "eval-limit", "score this many validation rows a task at most (default: all)", type=_integer(1))
    _add(running, "resume", "go on from the newest checkpoint in --output", action="store_true")
    _add(running, "overwrite", "replace an earlier run in --output", action="store_true")
    _add(running, "quiet", "print the results only", action="store_true")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> RunSettings:
    """The settings that ``argv`` (None: the process's) asks for; exits with code 2 and a named error if one is bad."""
    settings = RunSettings(**vars(parser.parse_args(argv)))
    experts = len(settings.kernel_sizes)
    if settings.top_k > experts and settings.top_k == _default(EPTConfig, "top_k"):
        parser.error(
            f"argument --kernel-sizes: must name at least {settings.top_k} experts, the number that --top-k mixes, "
            f"got {','.join(map(str, settings.kernel_sizes))!r}; name more, or give a smaller --top-k"
        )
    if settings.top_k > experts:
        parser.error(f"argument --top-k: must be at most {experts}, the number of --kernel-sizes, got {settings.top_k}")
    if settings.resume and settings.overwrite:
        parser.error("argument --resume: not together with --overwrite")
    return settings


def _add(group: argparse._ArgumentGroup, name: str, text: str, **options: Any) -> None:
    if not options.get("required"):
        default = _default(RunSettings, options.get("dest", name.replace("-", "_")))
        options["default"] = default
        if default is not None and "action" not in options:
            text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    group.add_argument(f"--{name}", help=text, **options)


def _number(*, above: float = -math.inf, least: float = -math.inf, below: float = math.inf) -> Callable[[str], float]:
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
    bounds += [f"< {below:g}"] * (below < math.inf)

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > above and value >= least and value < below):
            raise argparse.ArgumentTypeError(f"must be a number {' and '.join(bounds)}, got {text!r}")
        return value

    return convert


def _integer(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
        return value

    return convert


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"must be names separated by commas, each once, got {text!r}")
    return names


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be integers >= 1 separated by commas, got {text!r}")
    return sizes
