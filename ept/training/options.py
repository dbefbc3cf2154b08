"""The paper's seven ablations of EPT as settings (its table 4; spec section 4 has the published means)."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from peft import LoraConfig, PeftConfig

from ..data import parse_roles
from ..methods import METHODS
from ..trainers import TASK_BATCHING
from .arguments import EPTTrainingArguments
from .finite import NAN_POLICIES


class Ablation(NamedTuple):
    """What an ablation sets, by name of the setting, and in words.

    ``top_k="all"`` stands for the number of experts, whatever it is.
    """

    settings: dict[str, Any]
    text: str


ABLATIONS: dict[str, Ablation] = {
    "zero-init-seed": Ablation({"init_seed": "zero"}, "B starts at zero, the kernels do not"),
    "no-top-k": Ablation({"top_k": "all"}, "every task mixes all experts"),
    "no-alp-scaling": Ablation({"alp_scaling": False}, "no dimension-aware scale"),
    "no-contrastive-loss": Ablation({"contrastive_weight": 0.0}, "no contrastive task loss"),
    "all-2": Ablation({"kernel_sizes": (2,) * 8}, "eight experts of scale 2"),
    "all-8": Ablation({"kernel_sizes": (8,) * 8}, "eight experts of scale 8"),
    "mixed": Ablation(
        {"kernel_sizes": (2, 2, 4, 4, 6, 6, 8, 8)}, "the method itself, the pyramid that the others lack"
    ),
}


@dataclass(frozen=True)
class System:
    """A system: the class of its configs, the peak learning rate that suits it, and what it starts from.

    Attributes:
        defaults: config fields whose defaults here are not those of ``config``.
    """

    name: str
    config: type[PeftConfig]
    learning_rate: float
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def default(self, name: str) -> Any:
        """Default of a config field, or None where the config has no such field."""
        known = {entry.name: entry.default for entry in fields(self.config)}
        return self.defaults.get(name, known.get(name))

    def has(self, name: str) -> bool:
        """Whether the config has a field of this name."""
        return name in {entry.name for entry in fields(self.config)}

    def make_config(self, task_names: list[str], **options: Any) -> PeftConfig:
        """A config for these tasks; ``options`` are fields of it.

        Raises:
            ValueError: a value out of its range.
        """
        tasks = {"task_names": task_names} if self.has("task_names") else {}
        return self.config(**{**self.defaults, **tasks, **options})


#: Peak learning rates. EPT's is that of its seed; the kernels' is ten times that (``ept.parameter_groups``).
_LEARNING_RATES: dict[str, Any] = {
    "ept": EPTTrainingArguments.__dataclass_fields__["learning_rate"].default,
    "lora": 5e-4,
    "more": 1e-3,
    "moelora": 2e-3,
    "mixlora": 5e-4,
    "dcft": 3e-3,
    "tucka": 6e-3,  # its authors' for GLUE, at the alpha and the rank that are the defaults here
}

_LORA = System("lora", LoraConfig, _LEARNING_RATES["lora"], {"lora_alpha": 32})  # r and scaling as EPT's

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        *(
            System(method.peft_type.lower(), method.config, _LEARNING_RATES[method.peft_type.lower()])
            for method in METHODS
        ),
        _LORA,
    )
}


# ---- an option: said once, as a field of RunSettings


@dataclass(frozen=True)
class Option:
    """What the command line knows of a setting.

    Attributes:
        group: title of its group in ``--help``. text: its help; the default is added.
        argument, config: the field of ``EPTTrainingArguments``, or of the method's config, that it sets.
        decides: whether it decides the result, so that a run that is resumed must have the same.
        parser: further arguments of ``add_argument``.
    """

    group: str
    text: str
    argument: str = ""
    config: str = ""
    decides: bool = True
    flag: str = ""
    parser: Mapping[str, Any] = field(default_factory=dict)


def _option(group: str, text: str, default: Any = None, **options: Any) -> Any:
    """A setting that the command line gives, by default that of the trainer's argument, if it is one."""
    known = {name: options.pop(name) for name in ("argument", "config", "decides", "flag") if name in options}
    option = Option(group, text, **known, parser=options)
    if option.argument and default is None:
        default = EPTTrainingArguments.__dataclass_fields__[option.argument].default
    return field(default=default, metadata={"option": option})


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


def _columns(text: str) -> str:
    try:
        parse_roles(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class _Sources(argparse.Action):
    """One source as it is typed; several as a tuple."""

    SEEN = "_sources"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        sources = (*getattr(namespace, self.SEEN, ()), values)
        setattr(namespace, self.SEEN, sources)
        setattr(namespace, self.dest, sources if len(sources) > 1 else values)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be integers >= 1 separated by commas, got {text!r}")
    return sizes


#: Of transformers, those that need no further arguments.
_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
_TRACKERS = ("none", "tensorboard", "wandb", "trackio")

_WHAT, _RECIPE, _ADAPTER, _RUNNING = "what to train", "recipe", "adapter", "running"
_DESCRIPTIONS = {_ADAPTER: "of methods that have the setting; not all do"}


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run, each with the option of ``ept-train`` that gives it.

    The recipe's defaults are those of ``EPTTrainingArguments``. None is the method's own default where the method has
    such a setting (``lr``, and fields of its config), and is replaced by it. ``set`` holds further config fields.

    Raises:
        ValueError: an unknown method or ablation, a setting that the method does not have, or one that contradicts the
            ablation.
    """

    output: str = _option(_WHAT, "folder to write to", "", decides=False, required=True)
    method: str = _option(_WHAT, "what to train", "ept", choices=tuple(SYSTEMS))
    model: str = _option(_WHAT, "minilm, smollm2, a model directory, or a hub id (ID@REVISION pins it)", "minilm")
    data: str | tuple[str, ...] = _option(
        _WHAT,
        "sentiment, a file of one task (CSV, TSV, JSON lines, parquet) or NAME=FILE, a folder, or hub:<dataset id>; "
        "may be repeated for files",
        "sentiment",
        action=_Sources,
    )
    columns: tuple[str, ...] | None = _option(
        _WHAT,
        "columns of a file's texts and label (default: by their names); may be repeated",
        action="append",
        type=_columns,
        metavar="TASK=TEXT[,TEXT]:LABEL",
    )
    tasks: tuple[str, ...] | None = _option(_WHAT, "names, separated by commas (default: all)", type=_names)

    lr: float | None = _option(_RECIPE, "peak learning rate", type=_number(above=0))
    kernel_lr_ratio: float = _option(
        _RECIPE,
        "EPT: learning rate of the kernels relative to the rest",
        argument="kernel_lr_ratio",
        type=_number(above=0),
    )
    gate_lr_ratio: float = _option(
        _RECIPE, "EPT: that of the gates, times the embeddings' width", argument="gate_lr_ratio", type=_number(above=0)
    )
    warmup: float = _option(
        _RECIPE, "warm-up steps; below 1: share of all steps", argument="warmup_steps", type=_number(least=0)
    )
    weight_decay: float = _option(_RECIPE, "AdamW's weight decay", argument="weight_decay", type=_number(least=0))
    epochs: float = _option(
        _RECIPE, "passes over as many samples as all tasks have", argument="num_train_epochs", type=_number(above=0)
    )
    max_steps: int | None = _option(_RECIPE, "train for this many steps instead of --epochs", type=_integer(1))
    batch_size: int = _option(
        _RECIPE, "samples of a training batch", argument="per_device_train_batch_size", type=_integer(1)
    )
    gradient_accumulation_steps: int = _option(
        _RECIPE, "batches of an optimizer step", argument="gradient_accumulation_steps", type=_integer(1)
    )
    lr_scheduler: str = _option(
        _RECIPE, "how the rate falls after the warm-up", "linear", argument="lr_scheduler_type", choices=_SCHEDULERS
    )
    bf16: bool = _option(_RECIPE, "autocast to bfloat16", False, argument="bf16", action="store_true")
    fp16: bool = _option(
        _RECIPE, "autocast to float16 with a scaled loss; GPUs only", False, argument="fp16", action="store_true"
    )
    max_length: int = _option(_RECIPE, "tokens of a row at most", argument="max_length", type=_integer(8))
    task_batching: str = _option(
        _RECIPE, "draw the task of every sample, or of every batch", argument="task_batching", choices=TASK_BATCHING
    )
    seed: int = _option(_RECIPE, "of model, data order and dropout", 0, argument="seed", type=_integer(0))
    deterministic: bool = _option(
        _RECIPE,
        "only operations that give the same bits in every run",
        argument="full_determinism",
        action="store_true",
    )

    ablation: str | None = _option(_ADAPTER, "one of the paper's ablations of EPT, see below", choices=tuple(ABLATIONS))
    r: int | None = _option(_ADAPTER, "rank", config="r", type=_integer(1))
    alpha: float | None = _option(
        _ADAPTER, "scale of the update: alpha / r, for tucka alpha", config="lora_alpha", type=_number(above=0)
    )
    kernel_sizes: tuple[int, ...] | None = _option(
        _ADAPTER, "the pyramid, one size per expert, separated by commas", config="kernel_sizes", type=_sizes
    )
    top_k: int | None = _option(_ADAPTER, "experts mixed for a task", config="top_k", type=_integer(1))
    task_similarity: float | None = _option(
        _ADAPTER,
        "cosine of two task embeddings at the start",
        config="task_similarity",
        type=_number(least=0, below=1),
    )
    contrastive_weight: float | None = _option(
        _ADAPTER, "weight of the contrastive task loss", config="contrastive_weight", type=_number(least=0)
    )
    temperature: float | None = _option(
        _ADAPTER, "of the contrastive task loss", config="temperature", type=_number(above=0)
    )
    init_seed: str | None = _option(
        _ADAPTER, "start of the seed's left factor", config="init_seed", choices=("gaussian", "zero")
    )
    alp_scaling: bool | None = _option(
        _ADAPTER,
        "leave out the dimension-aware scale",
        config="alp_scaling",
        flag="--no-alp-scaling",
        action="store_false",
    )
    dropout: float | None = _option(
        _ADAPTER, "on the adapter's input", config="lora_dropout", type=_number(least=0, below=1)
    )
    set: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "option": Option(
                _ADAPTER,
                "another field of the method's config, such as num_experts=4 or routing=token; may be repeated",
                parser={"action": "append", "type": _setting, "metavar": "NAME=JSON"},
            )
        },
    )
    target_modules: tuple[str, ...] | None = _option(
        _ADAPTER, "module names, separated by commas (default: all in the blocks)", type=_names
    )

    save_steps: int = _option(_RUNNING, "steps between checkpoints; 0: none", 500, decides=False, type=_integer(0))
    eval_limit: int | None = _option(
        _RUNNING,
        "score this many validation rows a task at most (default: all)",
        argument="eval_limit",
        type=_integer(1),
    )
    eval_steps: int | None = _option(
        _RUNNING, "score every task after so many steps, too (default: at the end)", decides=False, type=_integer(1)
    )
    report_to: str = _option(
        _RUNNING,
        "where losses and scores go as they come",
        "none",
        argument="report_to",
        decides=False,
        choices=_TRACKERS,
    )
    nan_policy: str = _option(
        _RUNNING,
        "a step whose loss or gradient is not finite: stop, or skip it",
        argument="nan_policy",
        decides=False,
        choices=NAN_POLICIES,
    )
    resume: bool = _option(
        _RUNNING, "go on from the newest checkpoint in --output", False, decides=False, action="store_true"
    )
    overwrite: bool = _option(_RUNNING, "replace an earlier run in --output", False, decides=False, action="store_true")
    quiet: bool = _option(_RUNNING, "print the results only", False, decides=False, action="store_true")

    def __post_init__(self) -> None:
        if self.method not in SYSTEMS:
            raise ValueError(f"--method: must be one of {', '.join(SYSTEMS)}, got {self.method!r}")
        system = self.system
        self._ablate()
        if self.lr is None:
            self._put("lr", system.learning_rate)
        if self.bf16 and self.fp16:
            raise ValueError("--fp16: not together with --bf16")
        configured = {name: option.config for name, option in OPTIONS.items() if option.config}
        for name, config_field in configured.items():
            if getattr(self, name) is None:
                self._put(name, system.default(config_field))
            elif not system.has(config_field):
                raise ValueError(f"{option_of(name)}: not a setting of --method {self.method}")
        unknown = [name for name in self.set if not system.has(name) or name in configured.values()]
        if unknown:
            raise ValueError(f"--set: {unknown[0]!r} is not a further field of {system.config.__name__}")

    @property
    def system(self) -> System:
        """What ``method`` names."""
        return SYSTEMS[self.method]

    def config_options(self) -> dict[str, Any]:
        """Fields of the method's config that these settings give."""
        options = {option.config: getattr(self, name) for name, option in OPTIONS.items() if option.config}
        return {**{name: value for name, value in options.items() if self.system.has(name)}, **self.set}

    def arguments(self) -> dict[str, Any]:
        """Fields of ``EPTTrainingArguments`` that these settings give."""
        given = {option.argument: getattr(self, name) for name, option in OPTIONS.items() if option.argument}
        return {
            **given,
            "learning_rate": self.lr,
            "max_steps": self.max_steps or -1,
            "save_strategy": "steps" if self.save_steps else "no",
            "save_steps": self.save_steps or 500,
            "eval_strategy": "steps" if self.eval_steps else "no",
            "eval_steps": self.eval_steps,
            "disable_tqdm": self.quiet,
        }

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


#: The option of every setting, in the order of ``--help``.
OPTIONS: dict[str, Option] = {entry.name: entry.metadata["option"] for entry in fields(RunSettings)}


def option_of(name: str) -> str:
    """The option that gives a setting, as it is typed."""
    return OPTIONS[name].flag or f"--{name.replace('_', '-')}"


# ---- the command line

_CONFIG = "--config"


def build_parser() -> argparse.ArgumentParser:
    """The parser; its namespace has the fields of ``RunSettings``, and ``config``."""
    parser = _Parser(
        prog="ept-train",
        description="Train one adapter of one method on several tasks; write adapter, metrics and pictures.",
        epilog="ablations: " + "; ".join(f"{name}: {ablation.text}" for name, ablation in ABLATIONS.items()) + ".",
    )
    text = "settings by name, in YAML or JSON, such as the settings.json of a run; options that are typed come first"
    parser.add_argument(_CONFIG, help=text, metavar="FILE")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for entry in fields(RunSettings):
        option = OPTIONS[entry.name]
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group, _DESCRIPTIONS.get(option.group))
        arguments, text = {**option.parser, "dest": entry.name}, option.text
        if not arguments.get("required"):
            arguments["default"] = [] if entry.default is MISSING else entry.default
            shown = _methods_defaults(entry.name) if entry.default is None else _shown(entry.default)
            if shown and "action" not in arguments:
                text += f" (default: {shown})"
        groups[option.group].add_argument(option_of(entry.name), help=text, **arguments)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line: nobody finds it below two screens of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _configured(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """``words`` behind the options that the file of ``--config`` holds; what is typed takes their place."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(_CONFIG)
    path, typed = finder.parse_known_args(words)
    if path.config is None:
        return words
    try:
        content = yaml.safe_load(Path(path.config).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"argument {_CONFIG}: {path.config!r} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"argument {_CONFIG}: {path.config!r} must hold settings by name, such as 'lr: 0.001'")
    own = ("resume", "processes")  # of the run that wrote the file
    content = {name: value for name, value in content.items() if name not in own}
    unknown = [str(name) for name in content if name not in OPTIONS]
    if unknown:
        parser.error(
            f"argument {_CONFIG}: {path.config!r} has no setting {unknown[0]!r}; allowed: {', '.join(OPTIONS)}"
        )
    heads = {word.partition("=")[0] for word in typed}
    written = [word for name, value in content.items() if option_of(name) not in heads for word in _typed(name, value)]
    return [*written, *typed]


def _typed(name: str, value: Any) -> list[str]:
    """A setting as it would be typed."""
    option, default = OPTIONS[name], next(entry.default for entry in fields(RunSettings) if entry.name == name)
    flag, action = option_of(name), option.parser.get("action")
    if value is None or value == default:
        return []
    if action in ("store_true", "store_false"):
        return [flag] if value is (action == "store_true") else []
    if isinstance(value, dict):
        return [f"{flag}={key}={json.dumps(entry)}" for key, entry in value.items()]
    if isinstance(value, list) and action is not None:
        return [f"{flag}={entry}" for entry in value]
    return [f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> RunSettings:
    """The settings that ``argv`` (None: the process's) asks for; exits with code 2 and a named error if one is bad."""
    words = _configured(parser, list(sys.argv[1:] if argv is None else argv))
    given = vars(parser.parse_args(words))
    given.pop(_CONFIG.lstrip("-"))
    given.pop(_Sources.SEEN, None)
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


def _methods_defaults(setting: str) -> str:
    """The default of every method that has this setting: one for all, or each with the method's name."""
    if setting == "lr":
        defaults = {system.name: f"{system.learning_rate:g}" for system in SYSTEMS.values()}
    else:
        name = OPTIONS[setting].config
        defaults = {s.name: _shown(s.default(name)) for s in SYSTEMS.values() if s.has(name)}
    if len(set(defaults.values())) > 1 or 0 < len(defaults) < len(SYSTEMS):
        return ", ".join(f"{name} {default}" for name, default in defaults.items())
    return next(iter(defaults.values()), "")


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
