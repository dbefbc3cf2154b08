"""Every system that ``--method`` names, in one trainer and one command; the paper's ablations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from systems_testing import SMALL

import ept
from ept import models, train
from ept.data import TaskData, load_tasks
from ept.files import read_json
from ept.training import EPTTrainer, evaluate_tasks, load_trained
from ept.training.options import ABLATIONS, SYSTEMS, RunSettings, build_parser, parse
from ept.training.run import TASK_TYPES

#: Losses of their own.
OWN_LOSSES = {
    "ept": {"contrastive_loss"},
    "more": {"contrastive_loss"},
    "mixlora": {"load_balance_loss"},
    "dcft": {"orthogonality_loss"},
}
EXPERT_USE = {"ept", "more", "moelora"}
TASK_MAP = {"ept", "more"}


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_trainer(toys: SimpleNamespace, tasks: list[TaskData], tmp_path: Path) -> Callable[..., EPTTrainer]:
    def make(name: str, kind: str, **options: object) -> EPTTrainer:
        small = [toys.make_task(task.spec, 14, 6) for task in tasks]
        model = toys.make_model(kind, [task.spec for task in tasks])
        torch.manual_seed(1)
        config = SYSTEMS[name].make_config(
            [task.spec.name for task in tasks],
            target_modules=models.target_modules(model),
            modules_to_save=["heads"] if kind == "encoder" else None,
            task_type=TASK_TYPES[kind],
            lora_dropout=0.1,
            **SMALL[name],
        )
        arguments = toys.quiet_arguments(tmp_path / "checkpoints", **options)
        tokenizer = toys.make_tokenizer(kind)
        return EPTTrainer(peft.get_peft_model(model, config), arguments, tasks=small, processing_class=tokenizer)

    return make


def adapter_state(trainer: EPTTrainer) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("kind", ["encoder", "seq2seq", "causal"])
def test_total_loss_is_task_loss_plus_the_methods_own(make_trainer: Callable, name: str, kind: str) -> None:
    trainer = make_trainer(name, kind)
    before = adapter_state(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {} if name == "lora" else ept.auxiliary_losses(trainer.model)
    assert set(weights) == OWN_LOSSES.get(name, set())
    for entry in entries:
        own = sum(weight * entry[loss] for loss, (weight, _) in weights.items())
        assert entry["loss"] == pytest.approx(entry["task_loss"] + own, rel=1e-5)
        assert {key for key in entry if key.endswith("_loss")} == {"task_loss", *weights}
    moved = {key: not torch.equal(value, before[key]) for key, value in adapter_state(trainer).items()}
    assert sum(moved.values()) > 0.8 * len(moved)  # experts that no sample chose stay
    assert "eval_mean" in trainer.evaluate()


def test_resumed_training_equals_uninterrupted_training_to_the_bit(make_trainer: Callable, name: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    straight = make_trainer(name, "encoder", **options)
    straight.train()
    again = make_trainer(name, "encoder", **options)
    again.train(resume_from_checkpoint=str(Path(straight.args.output_dir) / "checkpoint-3"))
    wanted, found = straight.model.state_dict(), again.model.state_dict()
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []


def test_only_ept_has_several_learning_rates(make_trainer: Callable, name: str) -> None:
    groups = make_trainer(name, "encoder", learning_rate=1e-3).create_optimizer().param_groups
    rates = {group["lr"] for group in groups}
    assert rates == {1e-3} if name != "ept" else len(rates) > 1


def arguments_of(name: str) -> dict[str, object]:
    """Options of a small run: those that ``ept-train`` names, the others for ``--set``."""
    named = {key: value for key, value in SMALL[name].items() if key in ("r", "kernel_sizes")}
    named = {key: ",".join(map(str, v)) if isinstance(v, tuple) else v for key, v in named.items()}
    further = [f"--set={key}={value}" for key, value in SMALL[name].items() if key not in ("r", "kernel_sizes")]
    return {"options": {"r": None, "kernel_sizes": None} | named, "flags": further}


def test_one_command_trains_each(command: Callable, tmp_path: Path, name: str) -> None:
    output, small = tmp_path / "run", arguments_of(name)
    assert train.main(command(output, "--method", name, *small["flags"], **small["options"])) == 0
    pictures = {path.name for path in (output / "pictures").iterdir()}
    assert pictures == {
        "loss.png",
        *(["expert_use.png"] if name in EXPERT_USE else []),
        *(["task_embeddings.png"] if name in TASK_MAP else []),
    }
    metrics = read_json(output / "metrics.json")
    assert metrics["settings"]["method"] == name
    model, tokenizer, _ = load_trained(output)
    trained = load_file(output / "adapter" / "adapter_model.safetensors")
    parts = {part: count for part, count in metrics["parameters"].items() if part != "all"}
    saved = [tensor.numel() for tensor in trained.values() if tensor.is_floating_point()]  # TuckA saves a flag, too
    assert sum(parts.values()) == sum(saved)
    tasks = load_tasks(metrics["settings"]["data"], None)
    found = evaluate_tasks(model, tokenizer, tasks, max_length=metrics["settings"]["max_length"])
    for task, entry in metrics["tasks"].items():
        assert {metric: entry["after"][metric] for metric in found[task]} == found[task]


def test_one_command_trains_routing_by_token(command: Callable, tmp_path: Path) -> None:
    assert train.main(command(tmp_path / "run", "--set", "routing=token")) == 0
    assert {path.name for path in (tmp_path / "run" / "pictures").iterdir()} == {"loss.png"}
    model, _, _ = load_trained(tmp_path / "run")
    assert model.peft_config["default"].routing == "token"
    assert "task embeddings" not in read_json(tmp_path / "run" / "metrics.json")["parameters"]


@pytest.mark.parametrize(
    ("text", "value"), [("routing=token", "token"), ('routing="task"', "task"), ("top=3", 3), ("on=true", True)]
)
def test_a_word_needs_no_quotes(text: str, value: object) -> None:
    name = text.partition("=")[0]
    parsed = build_parser().parse_args(["--output", "x", "--set", text])
    assert parsed.set == [(name, value)]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_what_they_name(name: str) -> None:
    plain = RunSettings(output="x")
    settings = parse(build_parser(), ["--output", "x", "--ablation", name])
    changed = {key: value for key, value in settings.config_options().items() if value != plain.config_options()[key]}
    assert (
        changed
        == {
            "zero-init-seed": {"init_seed": "zero"},
            "no-top-k": {"top_k": 8},
            "no-alp-scaling": {"alp_scaling": False},
            "no-contrastive-loss": {"contrastive_weight": 0.0},
            "all-2": {"kernel_sizes": (2,) * 8},
            "all-8": {"kernel_sizes": (8,) * 8},
            "mixed": {},
        }[name]
    )
    assert settings.system.make_config(["a"], **settings.config_options()).task_names == ["a"]


def test_no_top_k_follows_the_number_of_experts() -> None:
    assert RunSettings(output="x", ablation="no-top-k", kernel_sizes=(1, 2, 2)).top_k == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nothing"], "argument --method: invalid choice: 'nothing'"),
        (["--method", "lora", "--kernel-sizes", "2,2"], "argument --kernel-sizes: not a setting of --method lora"),
        (["--method", "dcft", "--no-alp-scaling"], "argument --no-alp-scaling: not a setting of --method dcft"),
        (["--method", "more", "--ablation", "all-2"], "argument --ablation: needs --method ept, got --method more"),
        (["--ablation", "all-2", "--kernel-sizes", "2,4"], "argument --kernel-sizes: contradicts --ablation all-2"),
        (["--ablation", "none"], "argument --ablation: invalid choice: 'none'"),
        (["--set", "num_experts"], "argument --set: must be NAME=JSON, got 'num_experts'"),
        (["--set", "routing=a b"], "argument --set: must be NAME=JSON, got 'routing=a b'"),
        (["--set", "routing=word"], "argument of the adapter: routing must be 'task' or 'token', got 'word'"),
        (["--set", "num_experts=2"], "argument --set: 'num_experts' is not a further field of EPTConfig"),
        (["--method", "more", "--set", "r=2"], "argument --set: 'r' is not a further field of MoREConfig"),
        (["--method", "moelora", "--r", "6"], "argument of the adapter: r must be a multiple of num_experts=8"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(build_parser(), ["--output", "x", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_gives_each_methods_defaults() -> None:
    text = " ".join(build_parser().format_help().split())
    assert f"peak learning rate (default: ept {SYSTEMS['ept'].learning_rate:g}," in text
    for name in SYSTEMS:
        assert f"{name} {SYSTEMS[name].learning_rate:g}" in text
    for name in ABLATIONS:
        assert name in text
