"""``task_ids`` of every kind, to a layer, a model and ``generate``: a named error, or what each sample alone gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import ept

from .saved import inputs, make
from .support import many, outcome

NAMES = ["alpha", "beta", "gamma"]

_one = st.one_of(
    st.integers(-3, 5),
    st.sampled_from([*NAMES, "", "delta", "auto", True, False, None, 1.0, float("nan"), 10**30, -(2**63), np.int64(1)]),
    st.sampled_from([np.float32(1), np.bool_(True), b"alpha", [0], (1, 2), {}, object(), 2j]),
)
_dtypes = st.sampled_from(
    [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32, torch.float16, torch.complex64]
)


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    ids = draw(st.lists(st.integers(-2, 4), min_size=0, max_size=5))
    tensor = torch.tensor(ids).to(draw(_dtypes))
    shape = draw(st.sampled_from(["as it is", "column", "scalar", "expanded", "strided", "numpy", "meta"]))
    if shape == "column":
        return tensor[:, None]
    if shape == "scalar":
        return tensor[0] if len(tensor) else tensor
    if shape == "expanded":
        return tensor[:1].expand(3) if len(tensor) else tensor
    if shape == "strided":
        return tensor.repeat_interleave(2)[::2]
    if shape == "numpy":
        return tensor.numpy()
    return tensor.to("meta") if shape == "meta" else tensor


task_ids = st.one_of(
    _one,
    st.lists(st.integers(-1, 3) | st.sampled_from(NAMES), max_size=5),
    st.lists(_one, max_size=4),
    st.lists(st.integers(0, 2), min_size=3, max_size=3),
    st.lists(st.sampled_from(NAMES), min_size=3, max_size=3),
    st.lists(st.integers(0, 2), min_size=3, max_size=3).map(tuple),
    _tensors(),
)


def _meaning(given: Any) -> list[int]:
    """The ids of three samples, for what was accepted."""
    if isinstance(given, (torch.Tensor, np.ndarray)):
        given = given.tolist()
    several = given if isinstance(given, (list, tuple)) else [given] * 3
    return [NAMES.index(task) if isinstance(task, str) else int(task) for task in several]


def _run(category: str, call: Any, given: Any, routes: bool = True) -> None:
    result = outcome(category, lambda: call(given), (ValueError, TypeError), "task_ids")
    if result is not None:
        ids = _meaning(given)
        assert all(0 <= task < 3 for task in ids), f"{given!r} was accepted"
        if not routes:  # the method treats all tasks alike, and does not count ids
            return
        assert len(ids) == 3, f"{given!r} was accepted"
        torch.testing.assert_close(result, call(torch.tensor(ids)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ept", "moelora", "more", "dcft", "tucka"])
def test_of_a_model(name: str) -> None:
    torch.manual_seed(0)
    model = make(name)
    model.peft_config["default"].task_names = NAMES
    model.base_model.ept_task_tables["default"].names = tuple(NAMES)

    @many(60)
    @given(task_ids)
    @torch.no_grad()
    def run(given_ids: Any) -> None:
        routes = model.base_model.routes_by_task
        if given_ids is not None or routes:
            _run("task ids of models", lambda ids: model(inputs(), task_ids=ids), given_ids, routes)

    run()


def test_of_a_layer() -> None:
    torch.manual_seed(0)
    layer = ept.EPTLinear.from_linear(torch.nn.Linear(12, 10), ept.EPTConfig(r=2, task_names=NAMES)).eval()
    for kernel in layer.kernels:
        torch.nn.init.normal_(kernel)

    @many(100)
    @given(task_ids)
    @torch.no_grad()
    def run(given_ids: Any) -> None:
        _run("task ids of layers", lambda ids: layer(inputs(), ids), given_ids)

    run()


def test_of_generate() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    config = ept.EPTConfig(r=2, task_names=NAMES, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "kernels." in name:
            torch.nn.init.normal_(parameter, std=2)
    prompt = torch.randint(3, 20, (3, 4))
    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}

    @many(20)
    @given(task_ids)
    def run(given_ids: Any) -> None:
        _run("task ids of generate", lambda ids: model.generate(input_ids=prompt, task_ids=ids, **settings), given_ids)

    run()
