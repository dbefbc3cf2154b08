"""The command line of ``ept-train``: every option, its default and what it may be."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ept.training.ablations import ABLATIONS
from ept.training.arguments import EPTTrainingArguments
from ept.training.finite import NAN_POLICIES
from ept.training.sampler import TASK_BATCHING
from ept.training.systems import SYSTEMS, System


def _default(owner: type, name: str) -> Any:
    return next(entry.default for entry in fields(owner) if entry.name == name)


#: Settings that are fields of a method's config, and the field's name.
_CONFIG_FIELDS = {
    "r": "r",
    "alpha": "lora_alpha",
    "kernel_sizes": "kernel_sizes",
    "top_k": "top_k",
    "task_similarity": "task_similarity",
    "contrastive_weight": "contrastive_weight",
    "temperature": "temperature",
    "init_seed": "init_seed",
    "alp_scaling": "alp_scaling",
    "dropout": "lora_dropout",
}


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run; the recipe's defaults are those of ``EPTTrainingArguments`` and the method's config.

    None is the method's own default where the method has such a setting (``lr`` to ``dropout``), and is replaced by it.
    ``set`` holds further fields of the config.

    Raises:
        ValueError: an unknown method or ablation, a setting that the method does not have, or one that contradicts the
            ablation.
    """

    output: str
    method: str = "ept"
    ablation: str | None = None
    model: str = "minilm"
    data: str = "sentiment"
    tasks: tuple[str, ...] | None = None
    lr: float | None = None
    kernel_lr_ratio: float = _default(EPTTrainingArguments, "kernel_lr_ratio")
    gate_lr_ratio: float = _default(EPTTrainingArguments, "gate_lr_ratio")
    warmup: float = _default(EPTTrainingArguments, "warmup_steps")
    weight_decay: float = _default(EPTTrainingArguments, "weight_decay")
    epochs: float = _default(EPTTrainingArguments, "num_train_epochs")
    max_steps: int | None = None
    batch_size: int = _default(EPTTrainingArguments, "per_device_train_batch_size")
    max_length: int = _default(EPTTrainingArguments, "max_length")
    task_batching: str = _default(EPTTrainingArguments, "task_batching")
    r: int | None = None
    alpha: float | None = None
    kernel_sizes: tuple[int, ...] | None = None
    top_k: int | None = None
    task_similarity: float | None = None
    contrastive_weight: float | None = None
    temperature: float | None = None
    init_seed: str | None = None
    alp_scaling: bool | None = None
    dropout: float | None = None
    set: dict[str, Any] = field(default_factory=dict)
    target_modules: tuple[str, ...] | None = None
    seed: int = 0
    deterministic: bool = False
    save_steps: int = 500
    eval_limit: int | None = None
    nan_policy: str = _default(EPTTrainingArguments, "nan_policy")
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.method not in SYSTEMS:
            raise ValueError(f"--method: must be one of {', '.join(SYSTEMS)}, got {self.method!r}")
        system = self.system
        self._ablate()
        if self.lr is None:
            self._put("lr", system.learning_rate)
        for name, config_field in _CONFIG_FIELDS.items():
            if getattr(self, name) is None:
                self._put(name, system.default(config_field))
            elif not system.has(config_field):
                raise ValueError(f"{option_of(name)}: not a setting of --method {self.method}")
        unknown = [name for name in self.set if not system.has(name) or name in _CONFIG_FIELDS.values()]
        if unknown:
            raise ValueError(f"--set: {unknown[0]!r} is not a further field of {system.config.__name__}")

    @property
    def system(self) -> System:
        """What ``method`` names."""
        return SYSTEMS[self.method]

    def config_options(self) -> dict[str, Any]:
        """Fields of the method's config that these settings give."""
        named = {entry: getattr(self, name) for name, entry in _CONFIG_FIELDS.items() if self.system.has(entry)}
        return {**named, **self.set}

    def _ablate(self) -> None:
        if self.ablation is None:
            return
        if self.ablation not in ABLATIONS:
            raise ValueError(f"--ablation: must be one of {', '.join(ABLATIONS)}, got {self.ablation!r}")
        if self.method != "ept":
            raise ValueError(f"--ablation: needs --method ept, got --method {self.method}")
        for name, value in ABLATIONS[self.ablation].settings.items():
            if value == "all":
                value = len(self.kernel_sizes or self.system.default("kernel_sizes"))
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{option_of(name)}: contradicts --ablation {self.ablation}, which sets it to {value}")
            self._put(name, value)

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def option_of(name: str) -> str:
    """The option that gives a setting."""
    return "--no-alp-scaling" if name == "alp_scaling" else f"--{name.replace('_', '-')}"


def build_parser() -> argparse.ArgumentParser:
    """The parser; its namespace has exactly the fields of ``RunSettings``."""
    parser = argparse.ArgumentParser(
        prog="ept-train",
        description="Train one adapter of one method on several tasks; write adapter, metrics and pictures.",
        epilog="ablations: " + "; ".join(f"{name}: {ablation.text}" for name, ablation in ABLATIONS.items()) + ".",
    )
    what = parser.add_argument_group("what to train")
    _add(what, "output", "folder to write to", required=True)
    _add(what, "method", "what to train", choices=tuple(SYSTEMS))
    _add(what, "model", "minilm, smollm2, a model directory, or a hub id (ID@REVISION pins it)")
    _add(what, "data", "sentiment, a folder with an index.json, or hub:<dataset id>")
    _add(what, "tasks", "names, separated by commas (default: all)", type=_names)
    recipe = parser.add_argument_group("recipe")
    _add(recipe, "lr", "peak learning rate", type=_number(above=0))
    _add(recipe, "kernel-lr-ratio", "EPT: learning rate of the kernels relative to the rest", type=_number(above=0))
    _add(recipe, "gate-lr-ratio", "EPT: that of the gates, times the embeddings' width", type=_number(above=0))
    _add(recipe, "warmup", "warm-up steps; below 1: share of all steps", type=_number(least=0))
    _add(recipe, "weight-decay", "AdamW's weight decay", type=_number(least=0))
    _add(recipe, "epochs", "passes over as many samples as all tasks have", type=_number(above=0))
    _add(recipe, "max-steps", "train for this many steps instead of --epochs", type=_integer(1))
    _add(recipe, "batch-size", "samples of a training batch", type=_integer(1))
    _add(recipe, "max-length", "tokens of a row at most", type=_integer(8))
    _add(recipe, "task-batching", "draw the task of every sample, or of every batch", choices=TASK_BATCHING)
    _add(recipe, "seed", "of model, data order and dropout", type=_integer(0))
    _add(recipe, "deterministic", "only operations that give the same bits in every run", action="store_true")
    adapter = parser.add_argument_group("adapter", "of methods that have the setting; not all do")
    _add(adapter, "ablation", "one of the paper's ablations of EPT, see below", choices=tuple(ABLATIONS))
    _add(adapter, "r", "rank", type=_integer(1))
    _add(adapter, "alpha", "scale of the update: alpha / r, for tucka alpha", type=_number(above=0))
    _add(adapter, "kernel-sizes", "the pyramid, one size per expert, separated by commas", type=_sizes)
    _add(adapter, "top-k", "experts mixed for a task", type=_integer(1))
    _add(adapter, "task-similarity", "cosine of two task embeddings at the start", type=_number(least=0, below=1))
    _add(adapter, "contrastive-weight", "weight of the contrastive task loss", type=_number(least=0))
    _add(adapter, "temperature", "of the contrastive task loss", type=_number(above=0))
    _add(adapter, "init-seed", "start of the seed's left factor", choices=("gaussian", "zero"))
    _add(adapter, "no-alp-scaling", "leave out the dimension-aware scale", action="store_false", dest="alp_scaling")
    _add(adapter, "dropout", "on the adapter's input", type=_number(least=0, below=1))
    text = "another field of the method's config, such as num_experts=4 or routing=token; may be repeated"
    adapter.add_argument("--set", help=text, action="append", type=_setting, default=[], metavar="NAME=JSON")
    _add(adapter, "target-modules", "module names, separated by commas (default: all in the blocks)", type=_names)
    running = parser.add_argument_group("running")
    _add(running, "save-steps", "steps between checkpoints; 0: none", type=_integer(0))
    _add(running, "eval-limit", "score this many validation rows a task at most (default: all)", type=_integer(1))
    _add(running, "nan-policy", "a step whose loss or gradient is not finite: stop, or skip it", choices=NAN_POLICIES)
    _add(running, "resume", "go on from the newest checkpoint in --output", action="store_true")
    _add(running, "overwrite", "replace an earlier run in --output", action="store_true")
    _add(running, "quiet", "print the results only", action="store_true")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> RunSettings:
    """The settings that ``argv`` (None: the process's) asks for; exits with code 2 and a named error if one is bad."""
    given = vars(parser.parse_args(argv))
    try:
        settings = RunSettings(**{**given, "set": dict(given["set"])})
    except ValueError as error:
        parser.error(f"argument {error}")
    if settings.method == "ept":
        _check_experts(parser, settings)
    try:
        settings.system.make_config(["task"], **settings.config_options())
    except (TypeError, ValueError) as error:
        parser.error(f"argument of the adapter: {error}")
    if settings.resume and settings.overwrite:
        parser.error("argument --resume: not together with --overwrite")
    return settings


def _check_experts(parser: argparse.ArgumentParser, settings: RunSettings) -> None:
    sizes: Any = settings.kernel_sizes
    experts = len(sizes)
    top_k: Any = settings.top_k
    if top_k > experts and top_k == settings.system.default("top_k"):
        parser.error(
            f"argument --kernel-sizes: must name at least {settings.top_k} experts, the number that --top-k mixes, "
            f"got {','.join(map(str, sizes))!r}; name more, or give a smaller --top-k"
        )
    if top_k > experts:
        parser.error(f"argument --top-k: must be at most {experts}, the number of --kernel-sizes, got {settings.top_k}")


def _add(group: argparse._ArgumentGroup, name: str, text: str, **options: Any) -> None:
    if not options.get("required"):
        setting = options.get("dest", name.replace("-", "_"))
        options["default"] = default = _default(RunSettings, setting)
        shown = _methods_defaults(setting) if default is None else _shown(default)
        if shown and "action" not in options:
            text += f" (default: {shown})"
    group.add_argument(f"--{name}", help=text, **options)


def _methods_defaults(setting: str) -> str:
    """The default of every method that has this setting: one for all, or each with the method's name."""
    if setting == "lr":
        defaults = {system.name: f"{system.learning_rate:g}" for system in SYSTEMS.values()}
    else:
        name = _CONFIG_FIELDS.get(setting, "")
        defaults = {s.name: _shown(s.default(name)) for s in SYSTEMS.values() if s.has(name)}
    if len(set(defaults.values())) > 1 or 0 < len(defaults) < len(SYSTEMS):
        return ", ".join(f"{name} {default}" for name, default in defaults.items())
    return next(iter(defaults.values()), "")


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        if value.isidentifier():  # a word needs no quotes
            return name, value
        raise argparse.ArgumentTypeError(f"must be NAME=JSON, got {text!r}") from None


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
