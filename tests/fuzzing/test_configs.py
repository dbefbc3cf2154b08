"""Configs of every method with values of right and wrong types: one that works, or an error that names the field."""

from __future__ import annotations

import math
import tempfile
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ept

from .support import ODD_VALUES, many, outcome

CONFIGS = (
    *(ept.EPTConfig, ept.MOELoRAConfig, ept.MoREConfig, ept.DCFTConfig, ept.MixLoRAConfig),
    ept.TuckAConfig,
)
#: PEFT's own fields, which PEFT checks (or not).
_PEFT = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_PEFT |= {"inference_mode"}


def own_fields(kind: type) -> list[str]:
    return sorted(field.name for field in fields(kind) if field.init and field.name not in _PEFT)


anything = st.one_of(
    st.sampled_from(ODD_VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=6,
    ),
    st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple),
)


@st.composite
def overrides(draw: st.DrawFn, kind: type) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(own_fields(kind)), min_size=1, max_size=3, unique=True))
    return {name: draw(anything) for name in names}


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_config_works_or_names_the_field(kind: type) -> None:
    @many(60)
    @given(overrides(kind))
    def run(options: dict[str, Any]) -> None:
        # A field may be refused for what another one says: the message names one of the two.
        names = (
            *options,
            "top_k",
            "num_tasks",
            "r must be a multiple",
            "contrastive_weight",
            "group_size",
            "core_rank",
        )
        config = outcome("configs", lambda: kind(**options), (ValueError, TypeError), *names)
        if config is None:
            return
        assert config.r >= 1 and config.num_tasks >= 1
        assert 0 < config.lora_alpha < math.inf and 0 <= config.lora_dropout < 1
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            again = type(config).from_pretrained(folder)
        for name in own_fields(kind):
            before, after = getattr(config, name), getattr(again, name)
            same = before == after or (isinstance(before, (list, tuple, set)) and sorted(before) == sorted(after))
            assert same, f"{name} was {before!r} and is {after!r} after saving and loading"

    run()


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_odd_value_of_every_field(kind: type) -> None:
    for name in own_fields(kind):
        for value in ODD_VALUES:
            names = (name, "top_k") if name.startswith("kernel_") else (name,)
            outcome("configs", lambda n=name, v=value: kind(**{n: v}), (ValueError, TypeError), *names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha must be a number > 0"),
        ({"lora_alpha": 1e300}, "lora_alpha must be a number > 0"),
        ({"r": 10**9}, "r must be at most 65536"),
        ({"num_tasks": 10**9}, "num_tasks must be at most 65536"),
        ({"task_names": 5}, "task_names must be distinct, non-empty strings, got 5"),
        ({"target_modules": "("}, r"target_modules='\(' is not a regular expression"),
        ({"target_modules": [["q"]]}, "target_modules must be None or a list of strings"),
        ({"modules_to_save": "head"}, "modules_to_save must be None or a list of strings, got 'head'"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be None, an integer or a list of integers"),
        ({"kernel_sizes": iter(lambda: 2, 3)}, "kernel_sizes must name at most 4096 experts"),
        ({"temperature": 1e-30}, "temperature must be at least 1e-06, got 1e-30"),
    ],
)
def test_what_used_to_pass_or_to_name_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ept.EPTConfig(**options)
