"""``EPTConfig``: defaults, every refusal, and round trips."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from peft import PeftConfig

from ept import EPTConfig

# One value that differs from the default for each hyperparameter.
EVERYTHING = {
    "r": 4,
    "lora_alpha": 12.5,
    "kernel_sizes": (3, 1, 3),
    "kernel_pattern": {r"layer\.1": (2, 2, 4)},
    "top_k": 3,
    "num_tasks": 3,
    "task_names": ["a", "b", "c"],
    "lora_dropout": 0.25,
    "alp_scaling": False,
    "task_embedding_dim": 6,
    "temperature": 0.5,
    "task_similarity": 0.25,
    "contrastive_weight": 0.0,
    "init_seed": "zero",
    "target_modules": {"q", "v"},
    "exclude_modules": {"lm_head"},
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "modules_to_save": ["classifier"],
}


def test_defaults_of_the_paper() -> None:
    config = EPTConfig()
    assert (config.r, config.lora_alpha, config.top_k) == (8, 32, 2)
    assert config.kernel_sizes == (2, 2, 4, 4, 6, 6, 8, 8)
    assert (config.temperature, config.contrastive_weight, config.init_seed) == (0.05, 0.1, "gaussian")
    assert config.alp_scaling is True
    assert config.lora_dropout == 0.0
    assert (config.num_tasks, config.task_names, config.task_embedding_dim) == (8, None, None)


def test_task_similarity_is_the_measured_one() -> None:
    """Not of the paper: docs/recipe.md."""
    assert EPTConfig().task_similarity == 0.75


BAD = [
    ("kernel_sizes", (), "kernel_sizes must name at least one expert"),
    ("kernel_sizes", 4, "kernel_sizes must be a sequence of integers >= 1, got 4"),
    ("kernel_sizes", (2, 0), "kernel_sizes must be an integer >= 1, got 0"),
    ("kernel_sizes", (2, -1), "kernel_sizes must be an integer >= 1, got -1"),
    ("kernel_sizes", (2.0, 2), "kernel_sizes must be an integer >= 1, got 2.0"),
    ("r", 0, "r must be an integer >= 1, got 0"),
    ("r", -8, "r must be an integer >= 1, got -8"),
    ("r", 8.0, "r must be an integer >= 1, got 8.0"),
    ("r", True, "r must be an integer >= 1, got True"),
    ("r", None, "r must be an integer >= 1, got None"),
    ("lora_alpha", 0, "lora_alpha must be a number > 0, got 0"),
    ("lora_alpha", -1.0, "lora_alpha must be a number > 0, got -1.0"),
    ("lora_alpha", math.inf, "lora_alpha must be a number > 0, got inf"),
    ("lora_alpha", math.nan, "lora_alpha must be a number > 0, got nan"),
    ("lora_alpha", "32", "lora_alpha must be a number > 0, got '32'"),
    ("lora_alpha", True, "lora_alpha must be a number > 0, got True"),
    ("kernel_pattern", [2, 2], r"kernel_pattern must be None or \{pattern: kernel sizes\}, got \[2, 2\]"),
    ("kernel_pattern", {"q": (2, 0)}, r"kernel_pattern\['q'\]=\(2, 0\): every entry of kernel_sizes .*got 0"),
    ("kernel_pattern", {"(": (2, 2)}, r"kernel_pattern\['\('\]"),
    ("kernel_pattern", {"q": (2,)}, "top_k must be an integer from 1 to 1 .*got 2"),
    ("top_k", 0, "top_k must be an integer from 1 to 8 .*got 0"),
    ("top_k", 9, "top_k must be an integer from 1 to 8 .*got 9"),
    ("top_k", 2.0, "top_k must be an integer from 1 to 8 .*got 2.0"),
    ("top_k", True, "top_k must be an integer from 1 to 8 .*got True"),
    ("num_tasks", 0, "num_tasks must be an integer >= 1, got 0"),
    ("num_tasks", -3, "num_tasks must be an integer >= 1, got -3"),
    ("num_tasks", 2.5, "num_tasks must be an integer >= 1, got 2.5"),
    ("num_tasks", True, "num_tasks must be an integer >= 1, got True"),
    ("task_names", [], r"task_names must be distinct, non-empty strings, got \[\]"),
    ("task_names", ["a", "a"], "task_names must be distinct, non-empty strings, got .*'a', 'a'"),
    ("task_names", ["a", ""], "task_names must be distinct, non-empty strings"),
    ("task_names", ["a", 3], "task_names must be distinct, non-empty strings"),
    ("lora_dropout", 1.0, r"lora_dropout must be a number in \[0, 1\), got 1.0"),
    ("lora_dropout", -0.1, r"lora_dropout must be a number in \[0, 1\), got -0.1"),
    ("lora_dropout", math.nan, r"lora_dropout must be a number in \[0, 1\), got nan"),
    ("lora_dropout", "0.1", r"lora_dropout must be a number in \[0, 1\), got '0.1'"),
    ("alp_scaling", 1, "alp_scaling must be True or False, got 1"),
    ("alp_scaling", None, "alp_scaling must be True or False, got None"),
    ("task_embedding_dim", 0, "task_embedding_dim must be None or an integer >= 1, got 0"),
    ("task_embedding_dim", 1.5, "task_embedding_dim must be None or an integer >= 1, got 1.5"),
    ("task_embedding_dim", True, "task_embedding_dim must be None or an integer >= 1, got True"),
    ("temperature", 0, "temperature must be a number > 0, got 0"),
    ("temperature", -0.05, "temperature must be a number > 0, got -0.05"),
    ("temperature", math.inf, "temperature must be a number > 0, got inf"),
    ("task_similarity", 1.0, r"task_similarity must be a number in \[0, 1\), got 1.0"),
    ("task_similarity", -0.5, r"task_similarity must be a number in \[0, 1\), got -0.5"),
    ("task_similarity", math.nan, r"task_similarity must be a number in \[0, 1\), got nan"),
    ("task_similarity", True, r"task_similarity must be a number in \[0, 1\), got True"),
    ("contrastive_weight", -0.1, "contrastive_weight must be a number >= 0, got -0.1"),
    ("contrastive_weight", math.nan, "contrastive_weight must be a number >= 0, got nan"),
    ("contrastive_weight", None, "contrastive_weight must be a number >= 0, got None"),
    ("init_seed", "ones", "init_seed must be 'gaussian' or 'zero', got 'ones'"),
    ("init_seed", 0, "init_seed must be 'gaussian' or 'zero', got 0"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_value_is_named(argument: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPTConfig(**{argument: value})


def test_every_checked_argument_has_a_bad_value() -> None:
    unchecked = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    assert {argument for argument, _, _ in BAD} == set(EVERYTHING) - unchecked


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("top_k", 8),
        ("lora_dropout", 0.999),
        ("contrastive_weight", 0),
        ("num_tasks", 1),
        ("r", 1),
        ("lora_alpha", 1e-3),
    ],
)
def test_values_at_the_edge_are_allowed(argument: str, value: object) -> None:
    assert getattr(EPTConfig(**{argument: value}), argument) == value


def test_task_names_give_the_number_of_tasks() -> None:
    assert EPTConfig(task_names=["a", "b", "c"]).num_tasks == 3
    assert EPTConfig(task_names=("a", "b"), num_tasks=2).task_names == ["a", "b"]
    assert EPTConfig(task_names="alone").task_names == ["alone"], "not one task a letter"
    with pytest.raises(ValueError, match="num_tasks=4 contradicts the 2 task_names"):
        EPTConfig(task_names=["a", "b"], num_tasks=4)


def test_kernel_sizes_become_a_tuple() -> None:
    assert EPTConfig(kernel_sizes=[2, 3], top_k=1).kernel_sizes == (2, 3)


def test_everything_differs_from_the_defaults() -> None:
    default, config = EPTConfig(), EPTConfig(**EVERYTHING)
    for name, value in EVERYTHING.items():
        assert getattr(config, name) == value
        assert getattr(default, name) != value, f"{name}: choose another value for the round trips"


def as_json(config: EPTConfig) -> dict:
    return json.loads(json.dumps(config.to_dict(), default=sorted))


@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_round_trip_through_a_dict_and_json(arguments: dict) -> None:
    config = EPTConfig(**arguments)
    assert EPTConfig(**config.to_dict()) == config
    assert EPTConfig(**as_json(config)) == config
    assert as_json(config)["peft_type"] == "EPT"


@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["defaults", "everything"])
@pytest.mark.parametrize("reader", [EPTConfig, PeftConfig])
def test_round_trip_through_a_file(arguments: dict, reader: type[PeftConfig], tmp_path: Path) -> None:
    """PEFT's own reader finds the class by the type in the file."""
    config = EPTConfig(**arguments)
    config.save_pretrained(tmp_path)
    loaded = reader.from_pretrained(tmp_path)
    assert type(loaded) is EPTConfig
    for name in EPTConfig.__dataclass_fields__:
        if name not in ("inference_mode", "peft_version"):  # PEFT saves an adapter for inference
            assert getattr(loaded, name) == getattr(config, name), name
