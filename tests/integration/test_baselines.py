"""The methods beside EPT through ``peft.get_peft_model``, on the architectures that the README names."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from baselines_testing import awaken_all
from pyramid_testing import assert_matches
from safetensors.torch import save_file
from torch import nn

import ept

from .conftest import CASES, TASKS, Case

MIXED = ["gamma", "alpha", "beta"]
METHODS = {
    "more": (ept.MoREConfig, {"r": 4}),
    "moelora": (ept.MOELoRAConfig, {"r": 6, "num_experts": 3}),
    "mixlora": (ept.MixLoRAConfig, {"r": 3, "num_experts": 4}),
    "dcft": (ept.DCFTConfig, {"kernel_size": 4}),
}
BY_TASK = ["more", "moelora"]
MERGING = ["more", "moelora", "dcft"]


def config(method: str, case: Case, **overrides: Any) -> peft.PeftConfig:
    config_class, options = METHODS[method]
    settings = {
        "task_names": TASKS,
        "task_type": case.task_type,
        "target_modules": "all-linear",
        "exclude_modules": ["classifier"],
    }
    return config_class(**{**settings, **options, **overrides})


def adapted(method: str, case: Case, base: nn.Module, **overrides: Any) -> peft.PeftModel:
    model = peft.get_peft_model(copy.deepcopy(base), config(method, case, **overrides))
    torch.manual_seed(77)
    return awaken_all(model, std=0.2).eval()


def shapes(name: str) -> tuple[Case, nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    case = CASES[name]
    return case, case.build().eval(), case.batch()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_starts_as_its_base(method: str, name: str) -> None:
    case, base, batch = shapes(name)
    model = peft.get_peft_model(copy.deepcopy(base), config(method, case)).eval()
    with torch.no_grad():
        # DCFT starts small, not at zero. An activation may round a tensor's last entries another way than its first,
        # so MixLoRA's copies of hidden units may differ from the base's in the last bit.
        tolerance = {"dcft": 5e-2, "mixlora": 1e-6}.get(method, 0)
        torch.testing.assert_close(model(**batch, task_ids=MIXED).logits, base(**batch).logits, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_mixed_batch_equals_one_sample_at_a_time(method: str, name: str) -> None:
    case, base, batch = shapes(name)
    model = adapted(method, case, base)
    with torch.no_grad():
        mixed = model(**batch, task_ids=MIXED).logits
        assert not torch.allclose(mixed, base(**batch).logits, atol=1e-3)
        for row, task in enumerate(MIXED):
            single = model(**{key: value[row : row + 1] for key, value in batch.items()}, task_ids=task).logits
            assert_matches(mixed[row], single[0], 1e-4)  # in fp32, through a whole network
        if method in BY_TASK:
            assert not torch.allclose(mixed, model(**batch, task_ids="alpha").logits, atol=1e-3)
            with pytest.raises(ValueError, match="task_ids is missing"):
                model(**batch)
        else:
            assert torch.equal(mixed, model(**batch).logits)


@pytest.mark.parametrize("name", CASES)
def test_every_trainable_parameter_gets_a_gradient(method: str, name: str) -> None:
    case, base, batch = shapes(name)
    model = adapted(method, case, base).train()
    loss = model(**batch, task_ids=MIXED).logits.square().mean() + ept.auxiliary_loss(model)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    counts = ept.parameter_breakdown(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CASES)
def test_save_and_load_are_bit_equal(method: str, name: str, tmp_path: Path) -> None:
    case, base, batch = shapes(name)
    model = adapted(method, case, base)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    settings, found = model.peft_config["default"].to_dict(), loaded.peft_config["default"].to_dict()
    for field in {*METHODS[method][1], "peft_type", "lora_alpha", "task_names", "num_tasks", "target_modules"}:
        assert found[field] == settings[field], field
    with torch.no_grad():
        assert torch.equal(loaded(**batch, task_ids=MIXED).logits, model(**batch, task_ids=MIXED).logits)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_loads_in_a_fresh_process_after_only_import_ept(method: str, tmp_path: Path) -> None:
    case, base, batch = shapes("llama")
    model = adapted(method, case, base)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = model(**batch, task_ids=MIXED).logits.contiguous()
    save_file({"ids": batch["input_ids"], "logits": logits}, tmp_path / "expected.safetensors")
    script = f"""
import ept, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
expected = load_file({str(tmp_path / "expected.safetensors")!r})
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    assert torch.equal(model(input_ids=expected["ids"], task_ids={MIXED!r}).logits, expected["logits"])
print(type(model.peft_config["default"]).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [METHODS[method][0].__name__]


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_several_adapters_and_disabling(method: str, name: str, tmp_path: Path) -> None:
    case, base, batch = shapes(name)
    model = adapted(method, case, base)
    with torch.no_grad():
        first = model(**batch, task_ids=MIXED).logits
        model.add_adapter("second", config(method, case))
        assert torch.equal(model(**batch, task_ids=MIXED).logits, first)
        model.set_adapter("second")
        assert not torch.equal(model(**batch, task_ids=MIXED).logits, first)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad and ".ept_" in n}
        assert trainable and all(".second" in name for name in trainable)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, base(**batch).logits) or case.task_type == "SEQ_CLS"
        if method == "mixlora" and case.task_type != "SEQ_CLS":  # PEFT allows one head at a time
            model.base_model.set_adapter(["default", "second"])
            with pytest.raises(ValueError, match="one adapter of this method may be active at a time"):
                model(**batch)
        model.set_adapter("default")
        model.delete_adapter("second")
        assert torch.equal(model(**batch, task_ids=MIXED).logits, first)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", MERGING)
def test_merging(method: str, name: str) -> None:
    case, base, batch = shapes(name)
    model = adapted(method, case, base)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for task in TASKS:
            unmerged = model(**batch, task_ids=task).logits
            model.merge_adapter(task=task)
            torch.testing.assert_close(model(**batch, task_ids=task).logits, unmerged, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(model(**batch).logits, unmerged, atol=1e-4, rtol=1e-3)
            if method in BY_TASK:
                with pytest.raises(ValueError, match="task_ids must be"):
                    model(**batch, task_ids=TASKS[TASKS.index(task) - 1])
            model.unmerge_adapter()
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, originals[name]), name
        wanted = model(**batch, task_ids="beta").logits
        plain = model.merge_and_unload(task="beta")
        torch.testing.assert_close(plain(**batch).logits, wanted, atol=1e-4, rtol=1e-3)
    assert not any("ept" in name for name, _ in plain.named_modules())


def test_dcft_merges_without_a_task() -> None:
    case, base, batch = shapes("llama")
    model = adapted("dcft", case, base)
    with torch.no_grad():
        wanted = model(**batch).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**batch, task_ids=MIXED).logits, wanted, atol=1e-4, rtol=1e-3)
        model.unmerge_adapter()
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(**batch).logits, wanted, atol=1e-4, rtol=1e-3)


def test_mixlora_does_not_merge_and_changes_nothing() -> None:
    case, base, batch = shapes("llama")
    model = adapted("mixlora", case, base)
    with torch.no_grad():
        before = model(**batch).logits
        for attempt in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="can be neither merged nor exported"):
                attempt()
        assert torch.equal(model(**batch).logits, before)
        assert torch.equal(model.base_model.unload()(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_gradient_checkpointing(method: str, name: str, use_reentrant: bool) -> None:
    case, base, batch = shapes(name)
    model = adapted(method, case, base).train()

    def gradients() -> torch.Tensor:
        model.zero_grad()
        logits = model(**batch, task_ids=MIXED).logits
        (logits.square().mean() + ept.auxiliary_loss(model)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    if use_reentrant and method == "mixlora":
        with pytest.raises(ValueError, match="use_reentrant"):
            gradients()
        return
    found = gradients()
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])
def test_generation(method: str, name: str, beams: int) -> None:
    case, base, batch = shapes(name)
    model = adapted(method, case, base)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    together = model.generate(**inputs, task_ids=MIXED, **settings)
    for row, task in enumerate(MIXED):
        alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, task_ids=task, **settings)[0]
        assert torch.equal(together[row][: len(alone)], alone)
    if method not in BY_TASK:
        assert torch.equal(model.generate(**inputs, **settings), together)


def test_introspection_knows_what_a_method_has(method: str) -> None:
    case, base, _ = shapes("bert")
    model = adapted(method, case, base)
    assert ept.task_names(model) == TASKS
    if method in BY_TASK:
        for index, gates in ept.routing(model).values():
            assert index.shape == gates.shape and len(gates) == 3
            torch.testing.assert_close(gates.sum(-1), torch.ones(3))
    else:
        with pytest.raises(ValueError, match="does not give experts to tasks"):
            ept.routing(model)
    if method == "more":
        assert ept.task_embeddings(model).shape == (3, 32)
    else:
        with pytest.raises(ValueError, match="has no task embeddings"):
            ept.task_embeddings(model)
        with pytest.raises(ValueError, match="has no contrastive loss"):
            ept.contrastive_loss(model)


def test_another_methods_checkpoint_is_refused(tmp_path: Path) -> None:
    case, base, _ = shapes("bert")
    adapted("more", case, base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    dcft = json.loads(json.dumps(config("dcft", case).to_dict(), default=sorted))
    file.write_text(json.dumps({**dcft, "inference_mode": True, "target_modules": saved["target_modules"]}))
    with pytest.raises(ValueError, match="the checkpoint was made for another"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_scale_larger_than_a_layer_is_refused() -> None:
    case, base, _ = shapes("bert")
    with pytest.raises(ValueError, match=r"target module .*scale 64, larger"):
        peft.get_peft_model(base, config("dcft", case, kernel_size=64))


@pytest.mark.parametrize("method", ["more", "mixlora"])
def test_compiles_without_a_graph_break(method: str) -> None:
    torch._dynamo.reset()
    case, base, batch = shapes("llama")
    model = adapted(method, case, base)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([2, 0, 1])
    expected = model(**batch, task_ids=ids).logits
    torch.testing.assert_close(compiled(**batch, task_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_threads_do_not_see_each_others_routes() -> None:
    case, base, _ = shapes("llama")
    model = adapted("mixlora", case, base)
    batches = [case.batch() for _ in range(3)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    wrong: list[int] = []
    barrier = threading.Barrier(3)

    def serve(index: int) -> None:
        barrier.wait()
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(**batches[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
