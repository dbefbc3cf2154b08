"""``model.add_task(new_kernels=...)``: experts that only later tasks know, every earlier output the same to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import ept
from ept.inspecting.cli import main as inspect_cli
from ept.inspecting.prune import prune_experts
from ept.inspecting.summary import inspect_adapter
from ept.saved import AdapterError, read_adapter
from ept_kernels import fold_kernels

from .conftest import CASES, TASKS, Case, adapted
from .test_added_tasks import OPTIMIZERS, outputs, train


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def grown() -> tuple[Case, torch.nn.Module, peft.PeftModel]:
    """An adapter of three tasks to which a fourth has come with two experts, and a fifth with one; both trained."""
    torch.manual_seed(3)
    case = CASES["llama"]
    base = case.build()
    model = adapted(case, base, auto_routing=True)
    optimizer = OPTIMIZERS["adamw"]
    model.add_task("delta", new_kernels=(4, 2))
    train(model, case.batch(), optimizer(model.parameters()), "delta")
    model.add_task("epsilon", like="delta", new_kernels=[2])
    train(model, case.batch(), optimizer(model.parameters()), "epsilon")
    return case, base, model


def test_old_tasks_stay_to_the_bit(case: Case, tmp_path: Path) -> None:
    base = case.build()
    model, batch = adapted(case, base), case.batch()
    adamw = OPTIMIZERS["adamw"]
    train(model, batch, adamw(model.parameters()), [0, 1, 2])
    before = outputs(model, batch)
    experts = len(case.config().kernel_sizes)
    assert model.add_task("delta", new_kernels=(4, 4)) == 3
    new = set(trainable(model))
    layer = "ept_adapters.default.{}"
    ends = {layer.format(part) for part in ("gate_added", f"kernels.{experts}", f"kernels.{experts + 1}")}
    assert {name[name.index("ept_adapters") :] for name in new if "ept_adapters" in name} == ends
    assert len(new) == 3 * len(ept.adapters(model)) + 1
    assert all(torch.equal(*pair) for pair in zip(outputs(model, batch), before, strict=True))
    for _ in range(2):
        train(model, batch, adamw(model.parameters()), "delta")
        assert all(torch.equal(*pair) for pair in zip(outputs(model, batch), before, strict=True))
        model.set_adapter("default")  # PEFT makes everything trainable here
        assert set(trainable(model)) == new
    moved = [parameter for name, parameter in trainable(model).items() if "kernels" in name and parameter.any()]
    assert moved, "no new kernel was trained"

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, batch), before, strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(**batch, task_ids="delta").logits, model(**batch, task_ids=3).logits)
    train(loaded, batch, adamw(loaded.parameters()), "delta")
    assert set(trainable(loaded)) == new
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, batch), before, strict=True))


@pytest.mark.parametrize("kernels", [(), (2, 4)])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_old_tasks_stay_to_the_bit_on_every_backend(
    backend: str, name: str, kernels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPT_BACKEND", backend)
    torch.manual_seed(4)
    case = CASES[name]
    model, batch = adapted(case, case.build()), case.batch()

    @torch.no_grad()
    def old() -> list[torch.Tensor]:
        found = outputs(model, batch)
        for ids in ([2, 0, 1, 2, 0], [1, 2], [2], torch.tensor(1)):
            rows = torch.arange(len(ids) if isinstance(ids, list) else 3) % 3
            found.append(model(**{key: value[rows] for key, value in batch.items()}, task_ids=ids).logits)
        return found

    before = old()
    model.add_task("delta", new_kernels=kernels)
    assert all(torch.equal(*pair) for pair in zip(old(), before, strict=True))
    train(model, batch, OPTIMIZERS["sgd"](model.parameters()), [3, 3, 3])
    assert all(torch.equal(*pair) for pair in zip(old(), before, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_new_experts_are_chosen_at_once_beside_the_best_one(top_k: int) -> None:
    torch.manual_seed(5)
    case = CASES["bert"]
    model = adapted(case, case.build(), top_k=top_k)
    count = len(case.config().kernel_sizes)
    best = {layer: index[0, 0] for layer, (index, _) in ept.routing(model).items()}
    model.add_task("delta", like=0, new_kernels=(2, 4))
    for layer, (index, gates) in ept.routing(model).items():
        assert (index[:3] < count).all()
        wanted = {1: [count], 2: [count, best[layer]], 3: [count, count + 1, best[layer]]}[top_k]
        assert index[3].tolist() == wanted
        torch.testing.assert_close(gates[3], torch.full_like(gates[3], 1 / top_k), atol=1e-3, rtol=0)
        (*_, kernel) = ept.adapters(model)[layer].kernels
        assert not kernel.any()


def test_the_experts_of_the_next_task_learn_too() -> None:
    torch.manual_seed(6)
    case = CASES["llama"]
    model = adapted(case, case.build())
    model.add_task("delta", new_kernels=(4, 4))
    model.add_task("epsilon", like="delta", new_kernels=(2, 2))
    model.train()
    model(**case.batch(), task_ids="epsilon").logits.square().mean().backward()
    for layer, adapter in ept.adapters(model).items():
        own = len(adapter.kernels) - 2
        assert ept.routing(model)[layer][0][4, 0] == own
        assert adapter.kernels[own].grad.any(), layer


def test_nothing_finished_is_ever_trainable(tmp_path: Path) -> None:
    case = CASES["bert"]
    base = case.build()
    model = adapted(case, base)
    model.add_task("delta", new_kernels=(4,))
    new = set(trainable(model))
    with model.disable_adapter():
        pass
    assert set(trainable(model)) == new
    model.base_model.set_requires_grad("default", True)
    assert set(trainable(model)) == new
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True, **options)
        assert set(trainable(loaded)) == new
        for parameter in loaded.parameters():
            parameter.requires_grad_(True)
        groups = ept.parameter_groups(loaded.train(), 0.1)
        inside = {id(parameter) for group in groups for parameter in group["params"]}
        kept = {name for name, parameter in loaded.named_parameters() if id(parameter) in inside and ".ept_" in name}
        assert kept == new


def test_an_adapter_that_is_not_training_gets_experts_that_do_not_train(tmp_path: Path) -> None:
    case = CASES["llama"]
    base = case.build()
    model = adapted(case, base)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", case.config())
    before = set(trainable(model))
    model.add_task("delta", adapter_name="second", new_kernels=(2,))
    assert set(trainable(model)) == before
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.add_task("delta", new_kernels=(2,))
    assert not trainable(loaded)


def test_layers_whose_pyramids_differ(tmp_path: Path) -> None:
    case = CASES["llama"]
    base = case.build()
    config = case.config(kernel_sizes=(2, 2, 4, 4), kernel_pattern={".*": (3, 3, 6, 6)}, target_modules=["q_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(ValueError, match=r"new_kernels=\(2,\) does not fit layer '.*q_proj'.*\[2\] are not"):
        model.add_task("delta", new_kernels=(2,))
    assert model.add_task("delta", new_kernels=(3,)) == 3
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert {adapter.geometry.kernel_sizes for adapter in ept.adapters(loaded).values()} == {(3, 3, 6, 6, 3)}


def test_each_task_sees_the_experts_that_came_with_it_or_before(grown: tuple) -> None:
    _, _, model = grown
    for adapter in ept.adapters(model).values():
        known = [len(adapter.kernels) - 3] * 3 + [len(adapter.kernels) - 1, len(adapter.kernels)]
        for task, count in enumerate(known):
            logits = adapter.gate[:count].double() @ adapter.task_table.weight[task].double()
            selected, index = logits.topk(adapter.top_k)
            dense = torch.zeros(1, count, dtype=torch.float64).scatter(1, index[None], selected.softmax(0)[None])
            kernels = [kernel.double() for kernel in adapter.kernels[:count]]
            geometry = adapter._stages[min(max(task - 2, 0), 2)][1]
            wanted = fold_kernels(kernels, dense, adapter.scaling, geometry)
            torch.testing.assert_close(adapter.fold(task)[0].double(), wanted, rtol=1e-5, atol=1e-7)
        folded, groups, _ = adapter.fold(torch.tensor([4, 0, 3]))
        for row, task in enumerate((4, 0, 3)):
            torch.testing.assert_close(folded[groups[row]], adapter.fold(task)[0][0])


def test_gradients_reach_what_is_new_and_nothing_else(grown: tuple) -> None:
    case, _, model = grown
    model.train()
    model(**case.batch(), task_ids="epsilon").logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, name
    adapter = next(iter(ept.adapters(model).values()))
    assert adapter.gate.shape[0] == len(adapter.kernels)
    assert {group["name"].split()[0] for group in ept.parameter_groups(model, 0.1)} == {"seed", "kernels", "gates"}


def test_a_plain_task_afterwards_trains_its_embedding_alone(grown: tuple) -> None:
    case, _, model = grown
    batch = case.batch()
    before = outputs(model, batch)
    with torch.no_grad():
        before.append(model(**batch, task_ids="epsilon").logits)
    model.add_task("zeta")
    assert [name.rpartition(".")[2] for name in trainable(model)] == ["weight_added"]
    train(model, batch, OPTIMIZERS["adamw"](model.parameters()), "zeta")
    after = outputs(model, batch)
    with torch.no_grad():
        after.append(model(**batch, task_ids="epsilon").logits)
    assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))


def test_saving_exporting_merging_and_auto_know_them(grown: tuple, tmp_path: Path) -> None:
    case, base, model = grown
    model.eval()
    batch = case.batch()
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].added_kernels == ((3, (4, 2)), (4, (2,)))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    for task_ids in ("delta", ["epsilon", "delta", "alpha"], "auto"):
        with torch.no_grad():
            wanted = model(**batch, task_ids=task_ids).logits
            assert torch.equal(loaded(**batch, task_ids=task_ids).logits, wanted)
    report = ept.export_lora(model, "epsilon", tmp_path / "lora")
    assert report.error == 0
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    with torch.no_grad():
        wanted = model(**batch, task_ids="epsilon").logits
        torch.testing.assert_close(plain(**batch).logits, wanted, atol=1e-4, rtol=1e-3)
        model.merge_adapter(task="epsilon")
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-3)


def test_inspection_shows_who_knows_what(grown: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, model = grown
    model.save_pretrained(tmp_path)
    found = inspect_adapter(read_adapter(tmp_path))
    routes = ept.routing(model)
    for layer in found.layers:
        index, gates = routes[layer.name]
        dense = torch.zeros(5, len(layer.labels)).scatter(1, index, gates)
        torch.testing.assert_close(torch.tensor(layer.gates), dense)
        assert not torch.tensor(layer.gates)[:3, -3:].any()
    assert inspect_cli([str(tmp_path)]) == 0
    assert "added_kernels" in capsys.readouterr().out
    with pytest.raises(AdapterError, match="cannot be pruned: it has experts of tasks that were added later"):
        prune_experts(tmp_path, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_errors_change_nothing() -> None:
    case = CASES["bert"]
    model = adapted(case, case.build())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kernels in ((3,), 4, None, "44", (True,), (-2,), []):
        with pytest.raises(ValueError, match=r"new_kernels=.* (must hold kernel sizes|does not fit layer)"):
            model.add_task("delta", new_kernels=kernels)
    for like in ("omega", 7, 1.5, "auto"):
        with pytest.raises(ValueError, match=r"like=.* must be None or one of the tasks"):
            model.add_task("delta", like=like, new_kernels=(2,))
    assert model.peft_config["default"].task_names == TASKS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    token = peft.get_peft_model(case.build(), case.config(routing="token", contrastive_weight=0))
    with pytest.raises(ValueError, match="there is no task table to add to"):
        token.add_task("delta", new_kernels=(4,))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (((3, (4,)),), "from 1 to 2, and in their order"),
        (((0, (4,)),), "from 1 to 2, and in their order"),
        (((2, (4,)), (1, (4,))), "from 1 to 2, and in their order"),
        (((1, ()),), "at least one expert"),
        (3, "be None or"),
        (((True, (4,)),), "from 1 to 2, and in their order"),
    ],
)
def test_a_config_that_cannot_be_is_named(added: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"added_kernels must .*{message}"):
        CASES["bert"].config(added_kernels=added)


def test_two_active_adapters_need_a_name() -> None:
    case = CASES["llama"]
    model = adapted(case, case.build())
    model.add_adapter("second", case.config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="adapter_name must name one of the active adapters"):
        model.add_task("delta")
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        model.add_task("delta", adapter_name="third")
    assert model.add_task("delta", adapter_name="second", new_kernels=(2,)) == 3
    assert model.peft_config["default"].num_tasks == 3
