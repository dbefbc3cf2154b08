"""``peft.get_peft_model`` with EPT on every architecture: routing, generation, merging, checkpointing."""

from __future__ import annotations

import copy
import threading

import peft
import pytest
import torch

import ept

from .conftest import CASES, TASKS, Case, adapted, awaken

MIXED = ["gamma", "alpha", "beta"]


@pytest.mark.parametrize("typed", [True, False], ids=["task_type", "no task_type"])
def test_starts_as_exact_no_op(case: Case, typed: bool) -> None:
    base = case.build().eval()
    overrides = {} if typed else {"task_type": None}
    model = peft.get_peft_model(copy.deepcopy(base), case.config(**overrides)).eval()
    batch = case.batch()
    with torch.no_grad():
        assert torch.equal(base(**batch).logits, model(**batch, task_ids=torch.tensor([0, 1, 2])).logits)


@pytest.mark.parametrize("typed", [True, False], ids=["task_type", "no task_type"])
def test_mixed_batch_equals_one_task_at_a_time(case: Case, typed: bool) -> None:
    model = adapted(case, case.build().eval(), **({} if typed else {"task_type": None}))
    batch = case.batch()
    with torch.no_grad():
        plain = model.get_base_model()
        mixed = model(**batch, task_ids=MIXED).logits
        by_id = model(**batch, task_ids=torch.tensor([2, 0, 1])).logits
        assert torch.equal(mixed, by_id)
        with model.disable_adapter():
            assert not torch.allclose(plain(**batch).logits, mixed, atol=1e-3)
        for row, task in enumerate(MIXED):
            single = model(**{name: value[row : row + 1] for name, value in batch.items()}, task_ids=task).logits
            torch.testing.assert_close(mixed[row], single[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])
@pytest.mark.parametrize("typed", [True, False], ids=["task_type", "no task_type"])
def test_generate_routes_every_sample_and_its_beams(name: str, beams: int, typed: bool) -> None:
    torch.manual_seed(1)
    case = CASES[name]
    model = adapted(case, case.build().eval(), **({} if typed else {"task_type": None}))
    batch = case.batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    together = model.generate(**inputs, task_ids=MIXED, **settings)
    sequences = set()
    for row, task in enumerate(MIXED):
        alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, task_ids=task, **settings)[0]
        assert torch.equal(together[row][: len(alone)], alone)
        same_input = model.generate(**{k: v[:1] for k, v in inputs.items()}, task_ids=task, **settings)[0]
        sequences.add(tuple(same_input.tolist()))
    assert len(sequences) > 1, "the tasks must matter for this test to show anything"


def test_merge_and_unmerge(case: Case) -> None:
    model = adapted(case, case.build().eval())
    batch = case.batch()
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for task in TASKS:
            unmerged = model(**batch, task_ids=task).logits
            model.merge_adapter(task=task)
            torch.testing.assert_close(model(**batch).logits, unmerged, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(model(**batch, task_ids=task).logits, unmerged, atol=1e-4, rtol=1e-3)
            other = TASKS[TASKS.index(task) - 1]
            with pytest.raises(ValueError, match="task_ids must be"):
                model(**batch, task_ids=other)
            with pytest.raises(ValueError, match="already merged"):
                model.merge_adapter(task=other)
            model.unmerge_adapter()
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, originals[name]), name
        wanted = model(**batch, task_ids="beta").logits
        plain = model.merge_and_unload(task="beta")
        torch.testing.assert_close(plain(**batch).logits, wanted, atol=1e-4, rtol=1e-3)
    assert not any("ept" in name for name, _ in plain.named_modules())
    assert not plain._forward_pre_hooks
    assert "generate" not in plain.__dict__


def test_unload_gives_the_base_back(case: Case) -> None:
    base = case.build().eval()
    batch = case.batch()
    model = adapted(case, base)
    model.merge_adapter(task=0)
    plain = model.base_model.unload()
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, base(**batch).logits)


def test_merge_needs_a_task_and_rolls_back(case: Case) -> None:
    model = adapted(case, case.build().eval())
    with pytest.raises(ValueError, match="task_ids is missing"):
        model.merge_adapter()
    layers = list(ept.adapters(model).values())
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    with torch.no_grad():
        layers[-1].A.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(task=0)
    for name, parameter in model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name]), "a failed merge must leave every weight as it was"


@pytest.mark.parametrize(
    ("task_ids", "error", "message"),
    [
        (None, ValueError, "task_ids is missing"),
        ([0, 1], ValueError, "one id for each of the 3 samples"),
        ([0], ValueError, "one id for each of the 3 samples"),
        ([0, 1, 9], ValueError, "task_ids holds 9"),
        (torch.tensor([0, 1, 3]), ValueError, "out of range"),
        (torch.tensor([0, -1, 2]), ValueError, "out of range"),
        (torch.zeros(3, 1, dtype=torch.long), ValueError, "1-D"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "integer tensor"),
        ("delta", ValueError, "unknown task 'delta'"),
        (True, TypeError, "integers or names"),
        (3, ValueError, "task_ids holds 3"),
    ],
)
def test_bad_task_ids(case: Case, task_ids: object, error: type[Exception], message: str) -> None:
    model = adapted(case, case.build().eval())
    batch = case.batch()
    with torch.no_grad():
        before = model(**batch, task_ids=0).logits
        with pytest.raises(error, match=message):
            model(**batch, task_ids=task_ids)
        assert torch.equal(model(**batch, task_ids=0).logits, before), "a refused call must leave nothing behind"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2"])
def test_gradient_checkpointing_recomputes_under_the_same_tasks(name: str, use_reentrant: bool) -> None:
    torch.manual_seed(2)
    case = CASES[name]
    model = adapted(case, case.build()).train()
    batch = case.batch()

    def gradients() -> torch.Tensor:
        model.zero_grad()
        logits = model(**batch, task_ids=MIXED).logits
        (logits.square().mean() + ept.contrastive_loss(model)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = gradients()
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_every_trainable_parameter_gets_a_gradient(case: Case) -> None:
    model = adapted(case, case.build()).train()
    logits = model(**case.batch(), task_ids=MIXED).logits
    (logits.square().mean() + ept.contrastive_loss(model)).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not without
    assert not frozen


def test_threads_do_not_see_each_others_tasks() -> None:
    torch.manual_seed(3)
    case = CASES["bert"]
    model = adapted(case, case.build().eval())
    batch = case.batch()
    with torch.no_grad():
        expected = {task: model(**batch, task_ids=task).logits for task in range(3)}
    wrong: list[int] = []
    barrier = threading.Barrier(3)

    def serve(task: int) -> None:
        barrier.wait()
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(**batch, task_ids=task).logits, expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_deepcopy_is_independent(case: Case) -> None:
    model = adapted(case, case.build().eval())
    batch = case.batch()
    with torch.no_grad():
        before = model(**batch, task_ids=MIXED).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch, task_ids=MIXED).logits, before)
        awaken(twin, std=1.0)
        for table in twin.base_model.ept_task_tables.values():
            table.weight.neg_()
        assert torch.equal(model(**batch, task_ids=MIXED).logits, before)
        if case.generates:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            mine = model.generate(**inputs, task_ids=1, max_new_tokens=3, do_sample=False)
            twin_of_mine = copy.deepcopy(model).generate(**inputs, task_ids=1, max_new_tokens=3, do_sample=False)
            assert torch.equal(mine, twin_of_mine)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_half_precision_base_keeps_an_fp32_adapter(name: str) -> None:
    torch.manual_seed(4)
    case = CASES[name]
    base = case.build().eval()
    exact = adapted(case, base)
    model = peft.get_peft_model(copy.deepcopy(base).to(torch.bfloat16), case.config()).eval()
    adapter_state = {n: p for n, p in exact.state_dict().items() if ".ept_" in n}
    model.load_state_dict(adapter_state, strict=False)
    assert {p.dtype for n, p in model.named_parameters() if ".ept_" in n} == {torch.float32}
    batch = case.batch()
    with torch.no_grad():
        half, full = model(**batch, task_ids=MIXED).logits, exact(**batch, task_ids=MIXED).logits
    assert half.dtype == torch.bfloat16
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_autocast(name: str) -> None:
    torch.manual_seed(5)
    case = CASES[name]
    model = adapted(case, case.build()).train()
    batch = case.batch()
    full = model(**batch, task_ids=MIXED).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**batch, task_ids=MIXED).logits
        loss = half.float().square().mean() + ept.contrastive_loss(model)
    loss.backward()
    assert (half.float() - full).norm() < 0.05 * full.norm()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 cannot trace the context manager that PEFT's forward enters"
)
def test_compiles_without_a_graph_break(name: str) -> None:
    torch.manual_seed(6)
    torch._dynamo.reset()
    case = CASES[name]
    model = adapted(case, case.build().eval())
    batch = case.batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0])):
        torch.testing.assert_close(
            compiled(**batch, task_ids=ids).logits, model(**batch, task_ids=ids).logits, atol=1e-5, rtol=1e-4
        )


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(7)
    case = CASES["bert"]
    model = adapted(case, case.build(), lora_dropout=0.5)
    batch = case.batch()
    with torch.no_grad():
        assert torch.equal(model(**batch, task_ids=0).logits, model(**batch, task_ids=0).logits)
        model.train()
        assert not torch.equal(model(**batch, task_ids=0).logits, model(**batch, task_ids=0).logits)


def test_one_task_needs_no_ids() -> None:
    torch.manual_seed(8)
    case = CASES["llama"]
    model = adapted(case, case.build().eval(), task_names=None, num_tasks=1)
    batch = case.batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch, task_ids=0).logits)
        model.merge_adapter()
        model.unmerge_adapter()
    assert model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False).shape[1] == 9
    assert float(ept.contrastive_loss(model.train())) == 0


def test_use_tasks_reaches_a_model_called_without_ids() -> None:
    torch.manual_seed(9)
    case = CASES["bert"]
    model = adapted(case, case.build().eval())
    batch = case.batch()
    with torch.no_grad():
        expected = model(**batch, task_ids=torch.tensor([2, 0, 1])).logits
        with ept.use_tasks(torch.tensor([2, 0, 1])):
            assert torch.equal(model(**batch).logits, expected)
        with pytest.raises(ValueError, match="task_ids is missing"):
            model(**batch)
