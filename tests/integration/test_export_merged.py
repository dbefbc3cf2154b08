"""``export_merged``: a plain checkpoint, judged in a process without ``ept``."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from export_testing import assert_unchanged, bits, train_heads, without_ept
from pyramid_testing import assert_matches
from torch import nn
from transformers import PreTrainedModel

import ept

from .conftest import CASES, TASKS, Case, adapted, awaken

LOAD = """
from transformers import {auto} as Auto
def result(batch):
    return Auto.from_pretrained({path!r}).eval()(**batch){output}
"""
AUTO = {
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "t5-gated": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2", "vit"])
def test_loads_without_ept_with_equal_logits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    case = CASES[name]
    heads = {"bert": ["classifier"], "vit": ["classifier"]}.get(name)
    base = case.build().eval()
    model = train_heads(adapted(case, base, modules_to_save=heads))
    before, batch = bits(model), case.batch()
    with torch.no_grad():
        expected = model(**batch, task_ids="beta").logits
    path = ept.export_merged(model, "beta", tmp_path / "merged")
    assert_unchanged(model, before)
    assert model.base_model.merged_task is None
    with torch.no_grad():
        assert torch.equal(model(**batch, task_ids="beta").logits, expected)
    script = LOAD.format(auto=AUTO[name], path=str(path), output=".logits")
    assert_matches(without_ept(script, batch, tmp_path), expected, 1e-5)
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "model.safetensors"} <= names and not any("adapter" in file for file in names)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_every_task_has_a_checkpoint_of_its_own(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    model, batch = adapted(case, base), case.batch()
    for task, name in enumerate(TASKS):
        path = ept.export_merged(model, task, tmp_path / name)
        loaded = type(base).from_pretrained(path).eval()
        with torch.no_grad():
            assert_matches(loaded(**batch).logits, model(**batch, task_ids=name).logits, 1e-5)


def test_merged_weights_are_those_of_merge_adapter(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    base = case.build().half().eval()
    model = adapted(case, base)
    path = ept.export_merged(model, 1, tmp_path / "merged")
    loaded = type(base).from_pretrained(path)
    merged = copy.deepcopy(model).base_model.merge_and_unload(task=1)
    assert loaded.dtype == torch.float16
    for name, tensor in merged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_only_merged_weights_take_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is saved shares the storage of everything that the task does not change."""
    case = CASES["llama"]
    model = adapted(case, case.build().eval(), target_modules=["q_proj"])
    shared, fresh = set(), set()
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}

    def record(plain: PreTrainedModel, folder: Path) -> None:
        for name, tensor in plain.state_dict().items():
            (shared if tensor.data_ptr() in own else fresh).add(name)

    monkeypatch.setattr(type(model.base_model.model), "save_pretrained", record)
    ept.export_merged(model, 0, tmp_path / "merged")
    assert fresh == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert "lm_head.weight" in shared


def test_a_merged_model_exports_another_task_and_stays_merged(tmp_path: Path) -> None:
    case = CASES["llama"]
    base = case.build().eval()
    model, batch = adapted(case, base), case.batch()
    with torch.no_grad():
        expected = model(**batch, task_ids="gamma").logits
        model.base_model.merge_adapter(task="alpha")
        merged = model(**batch).logits
        ept.export_merged(model, "gamma", tmp_path / "merged")
        assert torch.equal(model(**batch).logits, merged) and model.base_model.merged_task == 0
    assert_matches(type(base).from_pretrained(tmp_path / "merged").eval()(**batch).logits, expected, 1e-5)


def test_the_named_adapter_is_exported_with_its_heads(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build().eval()
    model = adapted(case, base, modules_to_save=["classifier"])
    model.add_adapter("other", case.config(modules_to_save=["classifier"]))
    train_heads(awaken(model, std=0.5))
    batch = case.batch()
    path = ept.export_merged(model, "alpha", tmp_path / "merged", adapter_name="other")
    assert model.active_adapter == "default"
    model.set_adapter("other")
    with torch.no_grad():
        expected = model.eval()(**batch, task_ids="alpha").logits
        assert_matches(type(base).from_pretrained(path).eval()(**batch).logits, expected, 1e-5)
    with pytest.raises(ValueError, match=r"adapter_name must be one of .*'absent'"):
        ept.export_merged(model, "alpha", tmp_path / "absent", adapter_name="absent")


def test_a_model_in_training_can_be_exported(tmp_path: Path) -> None:
    """After a training step a graph may be alive, which cannot be copied."""
    case = CASES["llama"]
    model = adapted(case, case.build()).train()
    batch = case.batch()
    (model(**batch, task_ids=[0, 1, 2]).logits.square().mean() + ept.contrastive_loss(model)).backward()
    assert all(p.requires_grad == ("ept_" in name) for name, p in model.named_parameters())
    ept.export_merged(model, 0, tmp_path / "merged")
    assert model.training and all(p.requires_grad == ("ept_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_content(tmp_path: Path, overwrite: bool) -> None:
    case = CASES["bert"]
    model = adapted(case, case.build())
    target = tmp_path / "merged"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    if overwrite:
        ept.export_merged(model, 0, target, overwrite=True)
        assert (target / "config.json").exists() and not (target / "notes.txt").exists()
    else:
        with pytest.raises(FileExistsError, match="is not empty; overwrite=True"):
            ept.export_merged(model, 0, target)
        assert [file.name for file in target.iterdir()] == ["notes.txt"]
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]
    with pytest.raises(FileExistsError, match="is a file"):
        ept.export_merged(model, 0, next(target.iterdir()))


def test_nothing_is_left_of_a_failed_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES["bert"]
    model = adapted(case, case.build())
    target = tmp_path / "merged"
    ept.export_merged(model, 0, target)
    kept = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(plain: PreTrainedModel, folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError("disk full")

    monkeypatch.setattr(type(model.base_model.model), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        ept.export_merged(model, 1, target, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == kept
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    model = peft.get_peft_model(case.build(), case.config(target_modules=["lm_head", "c_fc"]))
    with pytest.raises(ValueError, match=r"layer 'lm_head' shares its weight with 'transformer\.wte'"):
        ept.export_merged(awaken(model), 0, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (None, ValueError, "task_ids is missing"),
        ("delta", ValueError, "unknown task 'delta'"),
        (3, ValueError, "holds 3; allowed: 0 to 2"),
        ([0], TypeError, "task must be one id or name"),
    ],
)
def test_bad_tasks(task: object, error: type[Exception], message: str, tmp_path: Path) -> None:
    case = CASES["bert"]
    model = adapted(case, case.build())
    for export in (ept.export_merged, ept.export_lora):
        with pytest.raises(error, match=message):
            export(model, task, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_or_saved(tmp_path: Path) -> None:
    case = CASES["llama"]
    config = ept.MixLoRAConfig(r=2, num_experts=2, num_tasks=2, target_modules=["gate_proj"])
    mix = peft.get_peft_model(case.build(), config)
    for export in (ept.export_merged, ept.export_lora):
        with pytest.raises(ValueError, match="MixLoRA"):
            export(mix, 0, tmp_path / "out")
    net = nn.Sequential(nn.Linear(16, 16))
    plain = peft.get_peft_model(net, ept.EPTConfig(r=2, num_tasks=1, target_modules=["0"]))
    with pytest.raises(TypeError, match="its base is Sequential"):
        ept.export_merged(plain, None, tmp_path / "out")
    with pytest.raises(ValueError, match="must be a PeftModel"):
        ept.export_merged(net, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
