"""Named adapters, saving and loading, and what a tuner refuses."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import ept

from .conftest import CASES, TASKS, Case, adapted, awaken

MIXED = ["gamma", "alpha", "beta"]


def _first(state: dict[str, torch.Tensor], suffix: str) -> str:
    return next(name for name in state if name.endswith(suffix))


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_save_and_load_are_bit_equal(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    model = adapted(case, base, r=3, kernel_sizes=(2, 3, 5), top_k=1, lora_alpha=7, alp_scaling=False)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    config, found = model.peft_config["default"], loaded.peft_config["default"]
    for field in ("r", "lora_alpha", "kernel_sizes", "top_k", "num_tasks", "task_names", "alp_scaling", "temperature"):
        assert getattr(found, field) == getattr(config, field), field
    batch = case.batch()
    with torch.no_grad():
        assert torch.equal(loaded(**batch, task_ids=MIXED).logits, model(**batch, task_ids=MIXED).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_loads_in_a_fresh_process_after_only_import_ept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES["llama"]
    base = case.build().eval()
    model = adapted(case, base)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    batch = case.batch()
    with torch.no_grad():
        save_file(
            {"ids": batch["input_ids"], "logits": model(**batch, task_ids=MIXED).logits.contiguous()},
            tmp_path / "expected.safetensors",
        )
    script = f"""
import ept, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
expected = load_file({str(tmp_path / "expected.safetensors")!r})
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    logits = model(input_ids=expected["ids"], task_ids={MIXED!r}).logits
assert torch.equal(logits, expected["logits"])
print("equal", type(model.peft_config["default"]).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "EPTConfig"]


def test_several_adapters(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    batch = case.batch()
    model = adapted(case, base)
    with torch.no_grad():
        plain = base(**batch).logits
        first = model(**batch, task_ids=1).logits
        model.add_adapter("second", case.config(r=2, kernel_sizes=(4, 2), task_names=None, num_tasks=5))
        assert torch.equal(model(**batch, task_ids=1).logits, first), "adding an adapter must not change the active one"
        awaken(model.base_model.model.get_submodule(next(iter(ept.adapters(model, "second")))).ept_adapters["second"])
        model.set_adapter("second")
        second = model(**batch, task_ids=4).logits
        assert not torch.equal(second, plain)
        assert not torch.equal(second, first)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad and ".ept_" in n}
        assert trainable
        assert all(".second." in name for name in trainable)
        model.set_adapter("default")
        assert torch.equal(model(**batch, task_ids=1).logits, first)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, plain) or case.task_type == "SEQ_CLS"
        model.save_pretrained(tmp_path)
        model.delete_adapter("default")
        assert list(model.peft_config) == ["second"]
        model.set_adapter("second")
        assert torch.equal(model(**batch, task_ids=4).logits, second)
        assert not any(".default" in name for name, _ in model.named_parameters() if ".ept_" in name)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again.load_adapter(tmp_path / "second", adapter_name="second")
    with torch.no_grad():
        again.eval().set_adapter("second")
        torch.testing.assert_close(again(**batch, task_ids=4).logits, second, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: {n: t * float("nan") if n.endswith(".A") else t for n, t in state.items()}, "not finite"),
        (lambda state: {n: t for n, t in state.items() if "task_tables" not in n}, "is missing"),
        (lambda state: {n: t[..., :-1].contiguous() if n.endswith(".gate") else t for n, t in state.items()}, "gate"),
        (lambda state: {**state, _first(state, ".A").replace(".A", ".kernels.99"): torch.zeros(2, 2)}, "no place"),
    ],
    ids=["not finite", "table missing", "gate of another width", "extra kernel"],
)
def test_broken_checkpoint_is_refused_before_anything_is_loaded(tmp_path: Path, damage, message: str) -> None:
    torch.manual_seed(0)
    case = CASES["bert"]
    base = case.build()
    adapted(case, base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model = adapted(case, base)
    before = _state(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, adapter_name="default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_checkpoint_of_another_pyramid_is_refused(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build()
    adapted(case, base, kernel_sizes=(2, 2, 4, 4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["kernel_sizes"] = [2, 4, 4, 8]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another pyramid"):
        peft.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"target_modules": ["query", "nonsense"]}, ValueError, "nonsense"),
        ({"target_modules": ["nonsense"]}, ValueError, "linear layers named"),
        ({"target_modules": r".*nonsense.*"}, ValueError, "matches no module"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, ValueError, "exclude_modules"),
        ({"target_modules": ["query"], "kernel_sizes": (2, 33)}, ValueError, "query.*scale 33, larger"),
        ({"target_modules": ["word_embeddings"]}, TypeError, "word_embeddings"),
    ],
)
def test_bad_targets_leave_the_model_untouched(overrides: dict, error: type[Exception], message: str) -> None:
    case = CASES["bert"]
    base = case.build()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(error, match=message):
        peft.get_peft_model(base, case.config(**overrides))
    assert [name for name, _ in base.named_modules()] == before
    assert not base._forward_pre_hooks
    assert "generate" not in base.__dict__


def test_breakdown_counts_what_is_trained(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(case, case.build())
    counts = ept.parameter_breakdown(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["task embeddings"] == len(TASKS) * ept.task_embeddings(model).shape[1]
    ept.print_parameter_breakdown(model)
    assert f"{sum(counts.values()):,d}" in capsys.readouterr().out


def test_introspection(case: Case) -> None:
    model = adapted(case, case.build())
    assert ept.task_names(model) == TASKS
    routes = ept.routing(model)
    assert set(routes) == set(ept.adapters(model))
    for index, gates in routes.values():
        assert index.shape == gates.shape == (len(TASKS), 2)
        torch.testing.assert_close(gates.sum(-1), torch.ones(len(TASKS)))
    with pytest.raises(ValueError, match="adapter_name"):
        ept.routing(model, "nobody")
    with pytest.raises(ValueError, match="EPT adapter"):
        ept.routing(torch.nn.Linear(2, 2))


def test_lora_is_untouched_by_the_import_of_ept() -> None:
    case = CASES["bert"]
    model = peft.get_peft_model(case.build().eval(), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert model.peft_config["default"].peft_type == peft.PeftType.LORA
    assert model.peft_config["default"].peft_type != "EPT"
    assert model(**case.batch()).logits.shape == (3, 2)
    with pytest.raises(ValueError, match="EPT adapter"):
        ept.contrastive_loss(model)


def test_all_linear_twice_beside_a_saved_head(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build()
    config = case.config(target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("second", case.config(target_modules="all-linear", task_type="SEQ_CLS"))
    assert set(ept.adapters(model, "second")) == set(ept.adapters(model, "default"))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second")
    assert set(ept.adapters(loaded)) == set(ept.adapters(model, "default"))
