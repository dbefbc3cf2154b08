"""``export_deltas`` and back: every task's merged weights from the base, one seed and a few numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from baselines_testing import awaken_all
from export_testing import assert_unchanged, bits, train_heads
from pyramid_testing import assert_matches
from safetensors.torch import load_file, save_file

import ept

from .conftest import CASES, TASKS, Case, adapted


def test_every_task_from_the_same_base(case: Case, tmp_path: Path) -> None:
    base = case.build().eval()
    model, batch = adapted(case, base), case.batch()
    before = bits(model)
    path = ept.export_deltas(model, tmp_path / "deltas")
    assert_unchanged(model, before)
    deltas = ept.load_deltas(path)
    assert deltas.tasks == TASKS
    for task, name in enumerate(TASKS):
        expected = copy.deepcopy(model).base_model.merge_and_unload(task=task).state_dict()
        for key, tensor in deltas.merged_weights(base, task):
            assert torch.equal(tensor, expected[key]), key
        served = ept.apply_delta(copy.deepcopy(base), path, name)
        with torch.no_grad():
            assert_matches(served(**batch).logits, model(**batch, task_ids=name).logits, 1e-5)


def test_a_task_is_120_numbers_a_layer(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = adapted(case, case.build())
    path = ept.export_deltas(model, tmp_path / "deltas", tasks=["gamma", 0])
    layers = ept.adapters(model)
    names = {file.name for file in path.iterdir()}
    assert names == {"deltas.json", "seed.safetensors", "task-0.safetensors", "task-1.safetensors"}
    for index, task in enumerate((2, 0)):
        tensors = load_file(path / f"task-{index}.safetensors")
        assert {name: tensor.shape for name, tensor in tensors.items()} == dict.fromkeys(layers, (120,))
        for name, adapter in layers.items():
            assert torch.equal(tensors[name], adapter.fold(task)[0][0])
    seed = load_file(path / "seed.safetensors")
    assert sum(t.numel() for t in seed.values()) == sum(a.A.numel() + a.B.numel() for a in layers.values())
    assert ept.load_deltas(path).tasks == ["gamma", "alpha"]


def test_trained_heads_arrive(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build().eval()
    model = train_heads(adapted(case, base, modules_to_save=["classifier"]))
    batch = case.batch()
    served = ept.apply_delta(copy.deepcopy(base), ept.export_deltas(model, tmp_path / "deltas"), "beta")
    with torch.no_grad():
        assert_matches(served(**batch).logits, model(**batch, task_ids="beta").logits, 1e-5)


def test_dcft(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    base = case.build().eval()
    config = ept.DCFTConfig(kernel_size=4, num_tasks=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = awaken_all(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    batch = case.batch()
    served = ept.apply_delta(copy.deepcopy(base), ept.export_deltas(model, tmp_path / "deltas"), "1")
    with torch.no_grad():
        assert_matches(served(**batch).logits, model(**batch).logits, 1e-5)


def test_another_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build().eval()
    model = train_heads(adapted(case, base, modules_to_save=["classifier"]))
    path = ept.export_deltas(model, tmp_path / "deltas")
    served = ept.apply_delta(copy.deepcopy(base), path, 0)
    wider = copy.deepcopy(base)
    wider.classifier = torch.nn.Linear(32, 5)
    almost = copy.deepcopy(base)
    with torch.no_grad():  # the last layer checked: those before it must not have been changed
        list(almost.bert.encoder.layer)[-1].output.dense.weight[0, 0] += 1
    others = {
        "is not the base": (served, almost, copy.deepcopy(base).half(), case.build()),
        "has no layer": (CASES["gpt2"].build(),),
        "classifier.bias of model is": (wider,),
    }
    for message, models in others.items():
        for other in models:
            before = bits(other)
            with pytest.raises(ValueError, match=message):
                ept.apply_delta(other, path, 1)
            assert_unchanged(other, before)
    for task in ("delta", 3, -1, True):
        with pytest.raises(ValueError, match="task must be one of"):
            ept.apply_delta(copy.deepcopy(base), path, task)


def _set(**fields: object):
    def damage(path: Path) -> None:
        content = json.loads((path / "deltas.json").read_text())
        (path / "deltas.json").write_text(json.dumps(content | fields))

    return damage


def _drop_a_seed(path: Path) -> None:
    tensors = load_file(path / "seed.safetensors")
    tensors.popitem()
    save_file(tensors, path / "seed.safetensors")


def _cut(name: str):
    def damage(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:-20])

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_set(format=2), ValueError, "is not of format 1"),
        (_set(layers={"a": {}}), ValueError, "are damaged"),
        (_drop_a_seed, ValueError, "damaged: .* is missing"),
        (_cut("seed.safetensors"), ValueError, "are damaged"),
        (_cut("task-0.safetensors"), ValueError, "are damaged"),
        (_cut("deltas.json"), ValueError, "is not valid JSON"),
        (lambda path: (path / "deltas.json").unlink(), FileNotFoundError, "holds no deltas"),
        (lambda path: (path / "task-0.safetensors").unlink(), FileNotFoundError, "task-0"),
    ],
)
def test_damaged_deltas(damage, error: type[Exception], message: str, tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build()
    path = ept.export_deltas(adapted(case, base), tmp_path / "deltas")
    damage(path)
    before = bits(base)
    with pytest.raises(error, match=message):
        ept.apply_delta(base, path, 0)
    assert_unchanged(base, before)


def test_what_has_no_deltas(tmp_path: Path) -> None:
    case = CASES["llama"]
    more = peft.get_peft_model(case.build(), ept.MoREConfig(r=2, num_tasks=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="MoREAdapter has no folded kernels; export_deltas serves EPT and DCFT"):
        ept.export_deltas(more, tmp_path / "deltas")
    model = adapted(case, case.build())
    for tasks in ([], [0, "alpha"]):
        with pytest.raises(ValueError, match="tasks must name at least one task, each once"):
            ept.export_deltas(model, tmp_path / "deltas", tasks=tasks)
    assert list(tmp_path.iterdir()) == []
