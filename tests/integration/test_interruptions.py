"""A forward pass, a generation or a merge that breaks off leaves the model as it was: no tasks, no half of a merge."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import nn

import ept
from ept import context
from ept.layer_adapter import LayerAdapter
from ept.tuner.layer import EPTLinearLayer

from .conftest import CASES, TASKS, Case, adapted

MIXED = ["gamma", "alpha", "beta"]
FAULTS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator"), KeyboardInterrupt()]
METHODS = {
    "ept": ept.EPTConfig,
    "tucka": ept.TuckAConfig,
    "moelora": ept.MOELoRAConfig,
    "more": ept.MoREConfig,
}


@contextmanager
def broken_layer(model: nn.Module, number: int, fault: BaseException) -> Iterator[None]:
    """Let the adapted layer of this number raise ``fault`` after its work."""
    layer = [module for module in model.modules() if isinstance(module, EPTLinearLayer)][number]

    def fail(*_: Any) -> None:
        raise fault

    handle = layer.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def call_wrapped(model: peft.PeftModel) -> Callable[..., Any]:
    return model


def call_base(model: peft.PeftModel) -> Callable[..., Any]:
    return model.get_base_model()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("door", [call_wrapped, call_base])
def test_the_next_pass_does_not_inherit_the_tasks_of_a_broken_one(
    case: Case, door: Callable, number: int, fault: BaseException
) -> None:
    model, batch = adapted(case, case.build().eval()), case.batch()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = [model(**batch, task_ids=MIXED).logits, model(**batch, task_ids=1).logits]
        with broken_layer(model, number, fault), pytest.raises(type(fault)):
            door(model)(**batch, task_ids=0)
        with pytest.raises(ValueError, match="task_ids"):  # and not the result for task 0
            door(model)(**batch)
        assert context.current() is None
        assert torch.equal(model(**batch, task_ids=MIXED).logits, wanted[0])
        assert torch.equal(model(**batch, task_ids=1).logits, wanted[1])
    assert same(state, model.state_dict())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_broken_generation_leaves_no_tasks(name: str, fault: BaseException) -> None:
    torch.manual_seed(2)
    case = CASES[name]
    model = adapted(case, case.build().eval())
    ids = torch.randint(3, 60, (3, 6))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "num_beams": 2}
    wanted = model.generate(**options, task_ids=MIXED)
    with broken_layer(model, 3, fault), pytest.raises(type(fault)):
        model.generate(**options, task_ids=0)
    assert context.current() is None
    with pytest.raises(ValueError, match="task_ids"):
        model.generate(**options)
    assert torch.equal(model.generate(**options, task_ids=MIXED), wanted)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_after_a_broken_pass(method: str, fault: BaseException) -> None:
    """The same steps give the same parameters, whether a pass broke between them or not."""
    case = CASES["bert"]
    torch.manual_seed(3)
    base, batches = case.build(), [case.batch() | {"labels": torch.tensor([0, 1, 0])} for _ in range(3)]
    found = []
    for breaks in (False, True):
        torch.manual_seed(4)
        config = METHODS[method](r=8, task_names=TASKS, target_modules=["query", "dense"])
        model = peft.get_peft_model(copy.deepcopy(base), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for batch in batches:
            if breaks:
                state = torch.get_rng_state()
                with broken_layer(model, 4, fault), pytest.raises(type(fault)):
                    model(**batch, task_ids=1)
                torch.set_rng_state(state)
                assert context.current() is None
            loss = model(**batch, task_ids=MIXED).loss + ept.auxiliary_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    assert same(*found)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_broken_pass_releases_its_memory(fault: BaseException) -> None:
    case = CASES["bert"]
    model = peft.get_peft_model(case.build(), case.config(target_modules=["query", "dense"])).train()
    seen = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        seen.append(weakref.ref(output))

    layers = [module for module in model.modules() if isinstance(module, EPTLinearLayer)]
    for layer in layers:
        layer.register_forward_hook(watch)
    with broken_layer(model, -1, fault), pytest.raises(type(fault)):
        model(**case.batch(), task_ids=0)
    fault.__traceback__ = None  # it holds the frames of the pass
    gc.collect()
    assert len(seen) > 5
    assert [ref for ref in seen if ref() is not None] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_broken_block_of_tasks_ends_as_any_block(fault: BaseException) -> None:
    layer = ept.EPTLinear(12, 10, config=ept.EPTConfig(r=2, num_tasks=2))
    x = torch.randn(3, 12)

    def fail() -> None:
        with ept.use_tasks([0, 1, 1]), ept.use_tasks(1):
            layer(x)
            raise fault

    with pytest.raises(type(fault)):
        fail()
    assert context.current() is None
    with pytest.raises(ValueError, match="task_ids"):
        layer(x)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("after", [0, 4])
def test_a_broken_merge_takes_everything_out(monkeypatch: pytest.MonkeyPatch, after: int, fault: BaseException) -> None:
    case = CASES["bert"]
    torch.manual_seed(5)
    model, batch = adapted(case, case.build().eval()), case.batch()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(**batch, task_ids=MIXED).logits
    calls = []
    cls = type(next(m for m in model.modules() if isinstance(m, LayerAdapter)))
    merge = cls.merge_into

    def fail(self: LayerAdapter, *args: Any) -> torch.Tensor:
        calls.append(self)
        if len(calls) > after:
            raise fault
        return merge(self, *args)

    monkeypatch.setattr(cls, "merge_into", fail)
    with pytest.raises(type(fault)):
        model.merge_adapter(task=1)
    monkeypatch.undo()
    assert model.merged_task is None
    assert same(state, model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(**batch, task_ids=MIXED).logits, wanted)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_pass_that_breaks_while_one_task_is_merged(fault: BaseException) -> None:
    case = CASES["bert"]
    torch.manual_seed(6)
    model, batch = adapted(case, case.build().eval()), case.batch()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.merge_adapter(task="beta")
        wanted = model(**batch).logits
        with broken_layer(model, 2, fault), pytest.raises(type(fault)):
            model(**batch)
        assert context.current() is None
        assert torch.equal(model(**batch).logits, wanted)
        with pytest.raises(ValueError, match="merged"):
            model(**batch, task_ids=0)
        model.unmerge_adapter()
    assert same(state, model.state_dict())
