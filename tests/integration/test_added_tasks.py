"""``model.add_task``: a task added to a trained adapter, every other task's output the same to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import ept

from .conftest import CASES, TASKS, Case, adapted, awaken


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of every old task alone, of a batch of all, and of one with more samples than tasks."""
    model.eval()
    many = {name: torch.cat([value] * 2) for name, value in batch.items()}
    ids = torch.tensor([2, 0, 1])
    with torch.no_grad():
        alone = [model(**batch, task_ids=task).logits for task in TASKS]
        return [*alone, model(**batch, task_ids=ids).logits, model(**many, task_ids=ids.repeat(2)).logits]


def train(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, task: object
) -> None:
    model.train()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss = model(**batch, task_ids=task).logits.square().mean() + ept.contrastive_loss(model)
        loss.backward()
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_old_tasks_stay_to_the_bit(case: Case, optimizer: str, tmp_path: Path) -> None:
    base = case.build()
    model = adapted(case, copy.deepcopy(base))
    batch = case.batch()
    stale = OPTIMIZERS[optimizer](model.parameters())
    train(model, batch, stale, [0, 1, 2])
    before = outputs(model, batch)
    assert model.add_task("delta") == 3
    new = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert new == ["base_model.ept_task_tables.default.weight_added"]
    table = model.base_model.ept_task_tables["default"]
    torch.testing.assert_close(table.weight[3], table.weight[:3].mean(0))
    start = table.weight[3].detach().clone()
    train(model, batch, OPTIMIZERS[optimizer](model.parameters()), "delta")
    stale.step()
    assert not torch.equal(table.weight[3], start)
    assert all(torch.equal(*pair) for pair in zip(outputs(model, batch), before, strict=True))
    model.set_adapter("default")
    train(model, batch, OPTIMIZERS[optimizer](model.parameters()), "delta")
    assert all(torch.equal(*pair) for pair in zip(outputs(model, batch), before, strict=True))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == new

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert ept.task_names(loaded) == [*TASKS, "delta"]
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, batch), before, strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(**batch, task_ids="delta").logits, model(**batch, task_ids=3).logits)
    train(loaded, batch, OPTIMIZERS[optimizer](loaded.parameters()), "delta")
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == new
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, batch), before, strict=True))


def test_several_are_added_one_after_the_other(tmp_path: Path) -> None:
    case = CASES["bert"]
    torch.manual_seed(0)
    base = case.build()
    model, batch = adapted(case, copy.deepcopy(base), auto_routing=True), case.batch()
    model.add_task("delta", like="beta")
    table = model.base_model.ept_task_tables["default"]
    assert torch.equal(table.weight[3], table.weight[1])
    train(model, batch, OPTIMIZERS["adamw"](model.parameters()), "delta")
    delta, before = table.weight[3].detach().clone(), outputs(model, batch)
    assert model.add_task("epsilon", like=3) == 4
    train(model, batch, OPTIMIZERS["adamw"](model.parameters()), ["epsilon", "delta", "epsilon"])
    assert torch.equal(table.weight[3], delta)
    assert not torch.equal(table.weight[4], delta)
    assert all(torch.equal(*pair) for pair in zip(outputs(model, batch), before, strict=True))
    assert table.prototypes.count.tolist() == [0, 0, 0, 12, 6]
    assert set(ept.routing(model)) == set(ept.adapters(model))
    groups = ept.parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1]
    assert model.infer_tasks(**batch).weights.shape == (3, 5)
    assert model.add_task("zeta", like="gamma") == len(table.weight) - 1 == 5
    train(model, batch, OPTIMIZERS["adamw"](model.parameters()), "zeta")
    assert not torch.equal(table.weight[5], table.weight[2])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for task_ids in (["zeta", "epsilon", "delta"], "auto"):
        with torch.no_grad():
            assert torch.equal(
                loaded(**batch, task_ids=task_ids).logits, model.eval()(**batch, task_ids=task_ids).logits
            )


def test_an_old_checkpoint_loads(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build()
    model, batch = adapted(case, copy.deepcopy(base)), case.batch()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert '"finished_tasks": 0,' in text
    (tmp_path / "adapter_config.json").write_text(text.replace('"finished_tasks": 0,', ""))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, batch), outputs(model, batch), strict=True))


def test_merging_and_deep_copies_know_the_new_task() -> None:
    case = CASES["llama"]
    torch.manual_seed(2)
    model, batch = adapted(case, case.build()), case.batch()
    model.add_task("delta", like=0)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = model(**batch, task_ids="delta").logits
        model.merge_adapter(task="delta")
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="task 3 is merged into the weights"):
        model.add_task("epsilon")


def test_errors_change_nothing() -> None:
    case = CASES["bert"]
    model = awaken(peft.get_peft_model(case.build(), case.config()))
    for name in (None, "", "auto", "beta", 3):
        with pytest.raises(ValueError, match='name must be a new name, none of "", "auto", alpha, beta, gamma'):
            model.add_task(name)
    with pytest.raises(ValueError, match=r"like='omega' must be None or one of the tasks: .*unknown task 'omega'"):
        model.add_task("delta", like="omega")
    with pytest.raises(ValueError, match="like must be one id or name"):
        model.add_task("delta", like=[0, 1])
    assert model.peft_config["default"].num_tasks == model.base_model.ept_task_tables["default"].num_tasks == 3
    unnamed = peft.get_peft_model(case.build(), case.config(task_names=None, num_tasks=2))
    with pytest.raises(ValueError, match="name must be None"):
        unnamed.add_task("delta")
    assert unnamed.add_task() == 2
    other = peft.get_peft_model(case.build(), ept.MoREConfig(task_names=TASKS, target_modules=["query"]))
    with pytest.raises(ValueError, match="add_task is not supported by MORE"):
        other.add_task("delta")
    with pytest.raises(ValueError, match="finished_tasks must be an integer from 0 to num_tasks=3, got 4"):
        case.config(finished_tasks=4)
