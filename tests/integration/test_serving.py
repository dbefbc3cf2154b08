"""Serving an adapted model: what inference keeps between calls, mixed batches from threads, routing by token."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import ept
from ept.tuner.layer import EPTLinearLayer

from .conftest import CASES, TASKS, Case, adapted, awaken

MIXED = ["gamma", "alpha", "beta"]


def logits(model: nn.Module, batch: dict[str, torch.Tensor], task_ids: object = MIXED) -> torch.Tensor:
    with torch.inference_mode():
        return model(**batch, task_ids=task_ids).logits


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """Every adapter parameter set anew, through ``.data``."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".ept_adapters." in name or "ept_task_tables" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def train(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch, task_ids=MIXED).logits.square().mean().backward()
    optimizer.step()
    model.eval()


def other_adapter(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(5)
    model.add_adapter("other", CASES["bert"].config())
    model.set_adapter("other")
    awaken(model)


def train_and_come_back(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    other_adapter(model, batch)
    logits(model, batch)
    model.set_adapter("default")
    train(model, batch)


def half_and_back(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.bfloat16()
    logits(model, batch)
    model.float()


CHANGES: dict[str, Callable[[nn.Module, dict[str, torch.Tensor]], object]] = {
    "a training step": train,
    "parameter.data": lambda model, batch: shaken(model, 3),
    "load_state_dict": lambda model, batch: model.load_state_dict(shaken(copy.deepcopy(model), 4).state_dict()),
    "another adapter": other_adapter,
    "another adapter and back": train_and_come_back,
    "bfloat16 and back": half_and_back,
    "merged and unmerged": lambda model, batch: (model.merge_adapter(task="beta"), model.unmerge_adapter()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_serves_what_its_parameters_are_now(change: str) -> None:
    torch.manual_seed(0)
    case = CASES["bert"]
    model = adapted(case, case.build())
    batch = case.batch()
    before = logits(model, batch)
    assert torch.equal(logits(model, batch), before)
    CHANGES[change](model, batch)
    now = logits(model, batch)
    assert torch.equal(now, logits(copy.deepcopy(model), batch)), "a copy has kept nothing"
    assert torch.equal(now, before) == (change == "merged and unmerged")


def test_disabling_an_adapter_passes_by_what_it_kept() -> None:
    torch.manual_seed(0)
    case = CASES["bert"]
    base = case.build().eval()
    model, batch = adapted(case, base), case.batch()
    before = logits(model, batch)
    with model.disable_adapter(), torch.inference_mode():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert torch.equal(logits(model, batch), before)


def test_eight_threads_serve_their_own_mixtures() -> None:
    torch.manual_seed(0)
    case = CASES["llama"]
    model, batch = adapted(case, case.build()), case.batch()
    mixtures = [[TASKS[(i + j) % 3] for j in range(3)] if i % 2 else TASKS[i % 3] for i in range(8)]
    expected = [logits(copy.deepcopy(model), batch, tasks) for tasks in mixtures]
    start, wrong = threading.Barrier(8, timeout=60), []

    def work(number: int) -> None:
        start.wait()
        for _ in range(10):
            if not torch.equal(logits(model, batch, mixtures[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_follows_parameters_and_names(beams: int) -> None:
    torch.manual_seed(1)
    case = CASES["t5"]
    model = adapted(case, case.build())
    inputs = {key: value for key, value in case.batch().items() if key != "decoder_input_ids"}
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    first = model.generate(**inputs, task_ids=MIXED, **settings)
    ids = torch.tensor([TASKS.index(name) for name in MIXED])
    assert torch.equal(model.generate(**inputs, task_ids=ids, **settings), first)
    shaken(model, 7)
    now = model.generate(**inputs, task_ids=MIXED, **settings)
    assert torch.equal(now, copy.deepcopy(model).generate(**inputs, task_ids=MIXED, **settings))
    assert now.shape != first.shape or not torch.equal(now, first)


# --- routing by token -------------------------------------------------------------------------------------------------


def by_token(case: Case, base: nn.Module, **overrides: object) -> peft.PeftModel:
    return adapted(case, base, routing="token", **overrides)


def test_tokens_route_in_every_architecture(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    model, batch = by_token(case, base), case.batch()
    with torch.no_grad():
        alone = model(**batch).logits
        assert torch.equal(model(**batch, task_ids=MIXED).logits, alone), "ids change nothing"
        assert not torch.equal(base(**batch).logits, alone)
    model.train()
    model(**batch).logits.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    gates = [p.grad for n, p in model.named_parameters() if n.endswith(".gate")]
    assert gates
    assert all(grad.abs().sum() > 0 for grad in gates)
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert loaded.peft_config["default"].routing == "token"
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, alone)


def test_starts_as_exact_no_op_and_merges_never() -> None:
    case = CASES["bert"]
    base = case.build().eval()
    model = peft.get_peft_model(copy.deepcopy(base), case.config(routing="token")).eval()
    batch = case.batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="chooses experts for every token"):
            merge(task="alpha")
    with torch.no_grad():
        assert torch.equal(model.unload()(**batch).logits, base(**batch).logits)


def test_an_adapter_saved_before_there_was_a_choice_routes_by_task(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build().eval()
    model = adapted(case, base)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert '"routing": "task",' in text
    (tmp_path / "adapter_config.json").write_text(text.replace('  "routing": "task",\n', ""))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    batch = case.batch()
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_needs_no_ids(beams: int) -> None:
    torch.manual_seed(1)
    case = CASES["llama"]
    model, batch = by_token(case, case.build()), case.batch()
    settings = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    tokens = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, task_ids=MIXED, **settings), tokens)


def test_what_looks_into_a_model_says_what_there_is() -> None:
    case = CASES["bert"]
    model, batch = by_token(case, case.build()), case.batch()
    with pytest.raises(ValueError, match="gives experts to tokens, not to tasks; route_tokens"):
        ept.routing(model)
    for call in (lambda: model(**batch, task_ids="auto"), lambda: model.learn_auto_routing([batch])):
        with pytest.raises(ValueError, match="with routing='token'"):
            call()
    assert not model.peft_config["default"].auto_routing, "a save with it could not be loaded"
    with pytest.raises(ValueError, match="has no task embeddings"):
        ept.task_embeddings(model)
    counts = ept.parameter_breakdown(model)
    assert "task embeddings" not in counts
    adapters = ept.adapters(model).values()
    assert counts["gates"] == sum(8 * adapter.in_features for adapter in adapters)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ept.contrastive_loss(model).item() == 0
    assert ept.auxiliary_losses(model) == {}
    assert ept.auxiliary_loss(model).item() == 0
    grouped = sum(p.numel() for group in ept.parameter_groups(model, 1e-3) for p in group["params"])
    assert grouped == sum(counts.values())


def test_a_token_routes_on_the_input_of_its_layer() -> None:
    case = CASES["bert"]
    model, batch = by_token(case, case.build()), case.batch()
    layers = {path: module for path, module in model.base_model.model.named_modules() if type(module) is EPTLinearLayer}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path, layer in layers.items():
        layer.register_forward_hook(lambda _, args, output, path=path: seen.update({path: (args[0], output)}))
    with torch.no_grad():
        model(**batch)
        for path, (x, output) in seen.items():
            adapter, base = layers[path].ept_adapters["default"], layers[path].base_layer
            flat = x.reshape(-1, x.shape[-1])
            rows = torch.stack([adapter.linear(row, base.weight, base.bias) for row in flat])
            torch.testing.assert_close(output.reshape(rows.shape), rows, atol=1e-5, rtol=1e-4)
    assert seen


def test_gradient_checkpointing_by_token() -> None:
    case = CASES["llama"]
    model, batch = by_token(case, case.build()), case.batch()
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)
