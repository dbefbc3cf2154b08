"""``peft.get_peft_model`` with TuckA: one route a pass, training, saving, merging a fixed route, generation."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pyramid_testing import HOST_READS, Recorder, assert_matches
from safetensors.torch import load_file, save_file
from torch import nn

import ept
from ept import TuckAConfig, fix_route, free_route, group_load
from ept.tuner import EPTLinearLayer

from .conftest import CASES, WIDTH, Case


def tucka_config(case: Case, **overrides: Any) -> TuckAConfig:
    settings = {
        "r": 4,
        "lora_alpha": 16.0,
        "num_groups": 3,
        "task_type": case.task_type,
        "target_modules": "all-linear",
        "exclude_modules": ["classifier"],
    }
    return TuckAConfig(**{**settings, **overrides})


def with_tucka(case: Case, base: nn.Module, **overrides: Any) -> peft.PeftModel:
    return peft.get_peft_model(copy.deepcopy(base), tucka_config(case, **overrides))


def routed(case: Case, base: nn.Module, **overrides: Any) -> peft.PeftModel:
    """A model whose router has seen a training batch and whose cores differ, in evaluation."""
    model = with_tucka(case, base, **overrides).train()
    with torch.no_grad():
        model(**case.batch())
        for name, parameter in model.named_parameters():
            if "ept_adapters" in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0))
    return model.eval()


def router_of(model: peft.PeftModel) -> nn.Module:
    return model.base_model.ept_task_tables["default"].router


def test_before_training_it_is_its_base_and_evaluation_changes_nothing(case: Case) -> None:
    base = case.build().eval()
    model, batch = with_tucka(case, base).eval(), case.batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert not router_of(model).ready
    assert not group_load(model).any()


def test_centred_factors_start_as_a_no_op_after_the_first_batch_too(case: Case) -> None:
    base = case.build().eval()
    model, batch = with_tucka(case, base, init="centred").train(), case.batch()
    model(**batch)
    with torch.no_grad():
        assert_matches(model.eval()(**batch).logits, base(**batch).logits, 1e-6)
    published = with_tucka(case, base).train()
    published(**batch)
    with torch.no_grad():
        assert not torch.allclose(published.eval()(**batch).logits, base(**batch).logits, atol=1e-4)


def test_one_route_for_all_layers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = routed(case, case.build().eval()), case.batch()
    router, routes, used = router_of(model), [], []
    forward = type(router).forward
    monkeypatch.setattr(type(router), "forward", lambda *a, **k: routes.append(forward(*a, **k)) or routes[-1])
    layers = [module for module in model.modules() if isinstance(module, EPTLinearLayer)]
    for layer in layers:
        adapter = layer.ept_adapters["default"]
        adapter.factors = lambda route, call=adapter.factors: used.append(route) or call(route)
    with torch.no_grad():
        model(**batch)
    assert len(routes) == 1
    assert len(used) == len(layers)
    assert all(route is routes[0] for route in used)


def test_parameter_count(case: Case) -> None:
    base = case.build()
    config = tucka_config(case, r=3, num_groups=4, group_size=3, core_rank=2)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    widths = [module.in_features for module in model.modules() if isinstance(module, EPTLinearLayer)]
    cores, bases, factors, centroids = 4 * 2 * 3 * 3, 3 * sum(widths), 3 * 2, 4 * 3 * WIDTH
    parts = {"cores": cores * len(widths), "bases": bases, "expert factors": factors * len(widths)}
    counted = ept.parameter_breakdown(model)
    assert {name: counted[name] for name in (*parts, "centroids")} == {**parts, "centroids": centroids}
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name}
    assert sum(trained.values()) == sum(parts.values()) + centroids


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_learns(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model, batch = with_tucka(case, case.build()).train(), case.batch()
    labels = {"labels": torch.tensor([0, 1, 0])} if name == "bert" else {"labels": batch["input_ids"]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=6e-3, weight_decay=0.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(40):
        loss = model(**batch, **labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    changed = [name for name, p in model.named_parameters() if name in start and not torch.equal(p, start[name])]
    assert len(changed) == len(start)
    assert int(group_load(model).sum()) == 40


_FRESH = """
import sys
import torch
from peft import PeftModel
import ept
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
folder, kind = sys.argv[1:]
kind = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}[kind]
base = kind.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(folder + "/batch")).logits}, folder + "/fresh")
"""


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_saved_and_loaded_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    base = case.build().eval()
    base.save_pretrained(tmp_path / "base")
    model, batch = routed(case, base), case.batch()
    model.save_pretrained(tmp_path / "adapter")
    save_file(batch, tmp_path / "batch")
    with torch.no_grad():
        expected = model(**batch).logits
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path), name], check=True)
    assert torch.equal(load_file(tmp_path / "fresh")["logits"], expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_centroids_stay(case: Case, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    base = case.build().eval()
    model, batch = routed(case, base), case.batch()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in keys if "ept_task_tables" in key} == {"centroids", "initialised"}
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, is_trainable=True, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    loaded.train()(**case.batch())  # the next training batch of a continued run
    router = loaded.base_model.ept_task_tables["other"].router
    assert torch.equal(router.centroids, router_of(model).centroids)
    with torch.no_grad():
        found, wanted = loaded.eval()(**batch).logits, model(**batch).logits
        # On low memory tensors stay where the file has them, and products round by how memory is aligned.
        torch.testing.assert_close(found, wanted, **({} if low_cpu_mem_usage else {"atol": 0, "rtol": 0}))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model, batch = routed(case, case.build().eval()), case.batch()
    length = batch["input_ids"].shape[1]
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.randint(3, 64, (3, 9))], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(3, 9, dtype=torch.long)], 1),
    }
    before = group_load(model)
    with torch.no_grad():
        plain, longer = model(**batch).logits, model(**padded).logits
    if name != "bert":
        longer = longer[:, :length]
    torch.testing.assert_close(longer, plain, atol=2e-5, rtol=1e-4)
    assert (group_load(model) - before).max() == 2


def test_merging_a_fixed_route(case: Case) -> None:
    base = case.build().eval()
    model, batch, weights = routed(case, base), case.batch(), [0.7, 0.4]
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        free = model(**batch).logits
        fix_route(model, 2, weights)
        forced = model(**batch).logits
        assert not torch.allclose(forced, free, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(model(**batch).logits, forced, atol=1e-4, rtol=1e-3)
        with pytest.warns(UserWarning, match="already merged, nothing to do"):
            model.merge_adapter()
        model.unmerge_adapter()
        free_route(model)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, originals[name]), name
        assert torch.equal(model(**batch).logits, free)
        fix_route(model, 2, torch.tensor(weights))
        model.merge_adapter(task=1)  # every task has this weight now
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, base(**batch).logits)
        assert torch.equal(model(**batch).logits, forced)  # disabling took it out
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(**batch).logits, forced, atol=1e-4, rtol=1e-3)
    assert not any("ept" in name for name, _ in plain.named_modules())
    assert not plain._forward_pre_hooks
    assert "generate" not in plain.__dict__


@pytest.mark.parametrize("arguments", [{}, {"task": 0}])
def test_no_task_can_be_merged(arguments: dict[str, Any]) -> None:
    case = CASES["bert"]
    model = routed(case, case.build())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no task has a weight of its own to merge; fix one route first"):
            merge(**arguments)
    with pytest.raises(ValueError, match="depends on the weight"):
        next(iter(ept.adapters(model).values())).delta_weight(0)


def test_fixed_routes_are_checked() -> None:
    case = CASES["bert"]
    model = routed(case, case.build())
    with pytest.raises(ValueError, match="group must be an integer from 0 to 2, got 3"):
        fix_route(model, 3, [1.0, 1.0])
    with pytest.raises(ValueError, match="weights must hold 2 numbers"):
        fix_route(model, 0, [1.0])
    other = peft.get_peft_model(case.build(), case.config())
    for function in (group_load, free_route):
        with pytest.raises(ValueError, match="TuckA adapter"):
            function(other)


def test_a_merge_that_fails_changes_nothing() -> None:
    case = CASES["bert"]
    model = routed(case, case.build())
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    layers = [module for module in model.modules() if isinstance(module, EPTLinearLayer)]
    with torch.no_grad():
        layers[-1].ept_adapters["default"].U.fill_(float("inf"))
    fix_route(model, 0, [1.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter()
    for name, parameter in model.named_parameters():
        assert name not in weights or torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])
def test_a_generation_routes_once(name: str, beams: int) -> None:
    torch.manual_seed(1)
    case = CASES[name]
    model, batch = routed(case, case.build().eval()), case.batch()
    before = int(group_load(model).sum())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    model.generate(**inputs, max_new_tokens=5, num_beams=beams, do_sample=False)
    assert int(group_load(model).sum()) == before + 1
    model(**batch)
    assert int(group_load(model).sum()) == before + 2  # and leaves no route behind


def test_checkpointing_routes_and_learns_the_same() -> None:
    case = CASES["llama"]
    model, batch = routed(case, case.build()).train(), case.batch()
    batch["labels"] = batch["input_ids"]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, before = gradients(), group_load(model).clone()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    assert any("centroids" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    assert int((group_load(model) - before).sum()) == 1


def test_router_module() -> None:
    case = CASES["bert"]
    late = "bert.encoder.layer.0.attention.self.value"
    base = case.build()
    model = with_tucka(case, base, router_module=late)
    with pytest.raises(
        ValueError, match=r"self\.query was called before .*self\.value, which routes: .* set router_module="
    ):
        model.train()(**case.batch())
    named = with_tucka(case, base, router_module="bert.encoder.layer.0.attention.self.query")
    named.train()(**case.batch())
    with pytest.raises(ValueError, match=r"router_module must name one adapted module, got 'query', which 2 of them"):
        with_tucka(case, base, router_module="query")
    with pytest.raises(ValueError, match=r"got 'nothing', which 0 of them match"):
        with_tucka(case, base, router_module="nothing")


def test_a_part_of_a_model_has_no_route() -> None:
    case = CASES["bert"]
    model = routed(case, case.build())
    first, second = [module for module in model.modules() if isinstance(module, EPTLinearLayer)][:2]
    first(torch.randn(2, 3, WIDTH))  # the router's own layer can decide
    with pytest.raises(ValueError, match="call the adapted model, not a part of it"):
        second(torch.randn(2, 3, WIDTH))


def test_adapters_by_name(case: Case) -> None:
    base = case.build().eval()
    model, batch = routed(case, base), case.batch()
    with torch.no_grad():
        first = model(**batch).logits
        targets = list(model.peft_config["default"].target_modules)  # "all-linear" sees no linear inside a tuner layer
        model.add_adapter("second", tucka_config(case, num_groups=1, r=2, target_modules=targets))
        model.set_adapter("second")
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable and all("second" in name for name in trainable)
        assert any("centroids" in name for name in trainable)
        assert torch.equal(model.eval()(**batch).logits, base(**batch).logits)  # not routed yet
        model.train()(**batch)
        second = model.eval()(**batch).logits
        assert not torch.allclose(second, base(**batch).logits, atol=1e-3)
        if case.task_type != "SEQ_CLS":  # PEFT saves a classifier with each adapter, and one is active at a time
            model.base_model.set_adapter(["default", "second"])
            both = model(**batch).logits
            assert not torch.allclose(both, first, atol=1e-3)
            assert not torch.allclose(both, second, atol=1e-3)
        model.set_adapter("default")
        assert torch.equal(model(**batch).logits, first)
        model.delete_adapter("second")
        assert torch.equal(model(**batch).logits, first)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_a_copy_routes_by_itself() -> None:
    case = CASES["llama"]
    model, batch = routed(case, case.build()), case.batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**batch).logits
        router_of(model).centroids.zero_()
        assert torch.equal(twin(**batch).logits, expected)
        before = group_load(model).clone()
        twin.generate(**{key: batch[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=2)
    assert torch.equal(group_load(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_base(dtype: torch.dtype) -> None:
    case = CASES["llama"]
    model, batch = routed(case, case.build().to(dtype)).train(), case.batch()
    assert {p.dtype for name, p in model.named_parameters() if "ept_" in name} == {torch.float32}
    output = model(**batch)
    assert output.logits.dtype == dtype
    output.logits.float().square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "ept_" in name]
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_autocast() -> None:
    case = CASES["bert"]
    model, batch = routed(case, case.build()), case.batch()
    with torch.no_grad():
        exact = model(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(**batch).logits
    torch.testing.assert_close(cast.float(), exact, atol=0.05, rtol=0.05)


def test_no_host_synchronisation_but_the_base_models_own(case: Case) -> None:
    base = case.build().eval()
    model, batch = routed(case, base), case.batch()
    counts = []
    for runs in (base, model):
        with torch.no_grad(), Recorder() as recorder:
            runs(**batch)
        counts.append([recorder.names().count(name) for name in HOST_READS])
    assert counts[0] == counts[1]


def test_compiles_as_one_graph() -> None:
    case = CASES["llama"]
    model, batch = routed(case, case.build()), case.batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)


def test_compiled_training_makes_the_centroids() -> None:
    case = CASES["llama"]
    model, batch = with_tucka(case, case.build()).train(), case.batch()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(2):
        for runs in (compiled, twin):
            torch.manual_seed(step)
            runs(**batch, labels=batch["input_ids"]).loss.backward()
        assert router_of(model).ready
    ours, theirs = router_of(model).centroids, router_of(twin).centroids
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)
    assert torch.equal(group_load(model), group_load(twin))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build()
    routed(case, base).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_groups": 3', '"num_groups": 2'))
    with pytest.raises(ValueError, match=r"centroids is \[6, 32\] in the checkpoint, \[4, 32\] in this model|\.G is"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_two_active_adapters_merge_as_they_run() -> None:
    """Each changes the input that the next one sees; their weights multiply in the same order."""
    case = CASES["llama"]
    model, batch = routed(case, case.build().eval()), case.batch()
    targets = list(model.peft_config["default"].target_modules)
    model.add_adapter("second", tucka_config(case, r=3, lora_alpha=30.0, target_modules=targets))
    fix_route(model, 0, [0.9, 0.3], "default")
    fix_route(model, 2, [0.2, 0.8], "second")
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-3)
