"""``TaskTable``: what may be passed as ``task_ids``, and ``use_tasks``."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from ept import EPTConfig, EPTLinear, TaskMixture, TaskTable, task_embeddings, use_tasks
from ept.context import TaskContext, activate, current

NAMES = ("cola", "mrpc", "rte")


@pytest.fixture
def table() -> TaskTable:
    return TaskTable(3, 4, NAMES)


def test_shape_and_repr(table: TaskTable) -> None:
    assert table.weight.shape == (3, 4)
    assert table.weight.requires_grad
    assert "num_tasks=3" in repr(table)
    assert list(table.state_dict()) == ["weight"]


@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.9])
def test_embeddings_start_as_alike_as_asked(similarity: float) -> None:
    torch.manual_seed(0)
    table = TaskTable(4, 20_000, similarity=similarity)
    first = table.weight.detach().clone()
    table.reset_parameters()
    assert not torch.equal(table.weight, first)
    for rows in (first, table.weight.detach()):
        wanted = torch.full((4, 4), similarity).fill_diagonal_(1)
        torch.testing.assert_close(torch.corrcoef(rows), wanted, rtol=0, atol=0.03)
        torch.testing.assert_close(rows.std(1), torch.ones(4), rtol=0, atol=0.03)


def test_layers_and_models_take_the_similarity_of_their_config() -> None:
    options = {"num_tasks": 2, "task_embedding_dim": 4096, "task_similarity": 0.5}
    layer = EPTLinear(8, 8, config=EPTConfig(**options))
    adapted = get_peft_model(nn.Sequential(nn.Linear(8, 8)), EPTConfig(target_modules=["0"], **options))
    for embeddings in (layer.task_table.weight.detach(), task_embeddings(adapted)):
        assert torch.corrcoef(embeddings)[0, 1] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (2, 2), ("cola", 0), ("rte", 2)])
def test_one_for_the_batch(table: TaskTable, given: int | str, expected: int) -> None:
    resolved = table.resolve(given)
    assert type(resolved) is int
    assert resolved == expected
    assert torch.equal(table.embed(resolved), table.weight[expected : expected + 1])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0, 2, 1], [0, 2, 1]),
        ((1, 1), [1, 1]),
        (range(3), [0, 1, 2]),
        (["rte", "cola"], [2, 0]),
        (["mrpc", 2], [1, 2]),
        ([], []),
        (torch.tensor([2, 0, 0]), [2, 0, 0]),
        (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
        (torch.tensor([2, 0], dtype=torch.uint8), [2, 0]),
        (torch.tensor([], dtype=torch.long), []),
        (torch.tensor([1]), [1]),
    ],
)
def test_one_for_each_sample(table: TaskTable, given: object, expected: list[int]) -> None:
    resolved = table.resolve(given)
    assert resolved.dtype == torch.long
    assert resolved.tolist() == expected
    assert torch.equal(table.embed(resolved), table.weight[expected])


def test_a_scalar_tensor_is_for_the_batch(table: TaskTable) -> None:
    resolved = table.resolve(torch.tensor(2))
    assert resolved.dim() == 0
    assert torch.equal(table.embed(resolved), table.weight[2:3])


def test_none_means_the_only_task() -> None:
    assert TaskTable(1, 4).resolve(None) == 0


def test_none_is_refused_with_more_tasks(table: TaskTable) -> None:
    with pytest.raises(ValueError, match=r"task_ids is missing: this adapter has 3 tasks .*0 to 2.*cola, mrpc, rte"):
        table.resolve(None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "task_ids holds 3; allowed: 0 to 2, or a name among cola, mrpc, rte"),
        (-1, "task_ids holds -1; allowed: 0 to 2"),
        ([0, 5], "task_ids holds 5; allowed: 0 to 2"),
        ("sst2", "task_ids names the unknown task 'sst2'; allowed: 0 to 2, or a name among cola, mrpc, rte"),
        (["cola", "nli"], "task_ids names the unknown task 'nli'"),
        ("", "task_ids names the unknown task ''"),
        (torch.tensor(3), r"task_ids holds an id out of range; allowed: 0 to 2.*got 3"),
        (torch.tensor([0, 3]), r"task_ids holds an id out of range; allowed: 0 to 2.*got \[0, 3\]"),
        (torch.tensor([0, -1]), r"task_ids holds an id out of range; allowed: 0 to 2.*got \[0, -1\]"),
        (torch.tensor([[0], [1]]), r"task_ids must be a scalar or 1-D tensor, got shape \[2, 1\]"),
    ],
)
def test_a_bad_value_is_named(table: TaskTable, given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.resolve(given)


def test_a_name_without_names() -> None:
    with pytest.raises(ValueError, match="task_ids names the unknown task 'cola'; allowed: 0 to 1"):
        TaskTable(2, 4).resolve("cola")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.0, "task_ids must be an integer, a name, .* got float"),
        ({0, 1}, "task_ids must be .* got set"),
        (True, "task_ids must hold integers or names, got True"),
        ([True, 0], "task_ids must hold integers or names, got True"),
        ([0.0], "task_ids must hold integers or names, got 0.0"),
        ([None], "task_ids must hold integers or names, got None"),
        (torch.tensor([0.0, 1.0]), "task_ids must be an integer tensor, got torch.float32"),
        (torch.tensor([True, False]), "task_ids must be an integer tensor, got torch.bool"),
        (torch.tensor([1j]), "task_ids must be an integer tensor, got torch.complex64"),
    ],
)
def test_a_bad_type_is_named(table: TaskTable, given: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        table.resolve(given)


@pytest.mark.parametrize("tasks", [1, torch.tensor(1), torch.tensor([1, 1])])
def test_the_embedding_of_a_task_learns(table: TaskTable, tasks: int | torch.Tensor) -> None:
    table.embed(tasks).sum().backward()
    assert table.weight.grad[1].all()
    assert not table.weight.grad[[0, 2]].any()


# --- use_tasks --------------------------------------------------------------------------------------------------------


def test_use_tasks_nests_and_restores() -> None:
    assert current() is None
    with use_tasks(1) as outer:
        assert current() is outer
        with use_tasks([0, 1]) as inner:
            assert current() is inner
            assert current().task_ids == [0, 1]
        assert current() is outer
    assert current() is None


def test_use_tasks_restores_after_an_exception() -> None:
    with use_tasks(1) as outer:
        with pytest.raises(KeyError), use_tasks(2):
            raise KeyError
        assert current() is outer
    with pytest.raises(KeyError), use_tasks(2):
        raise KeyError
    assert current() is None


def test_a_context_may_be_entered_again() -> None:
    """One context for two passes, as a trainer may keep it."""
    context = TaskContext(1)
    for _ in range(2):
        with activate(context), use_tasks(2):
            assert current().task_ids == 2
        assert current() is None


def test_a_layer_alone_takes_a_mixture_but_not_auto() -> None:
    torch.manual_seed(0)
    layer = EPTLinear(13, 11, config=EPTConfig(num_tasks=3, r=2, kernel_sizes=(2, 2, 3), task_embedding_dim=5))
    for kernel in layer.kernels:
        nn.init.normal_(kernel)
    x, weights = torch.randn(4, 5, 13), torch.rand(4, 3).softmax(1)
    mixed = layer(x, TaskMixture(weights))
    base = nn.functional.linear(x, layer.weight, layer.bias)
    expected = base + sum(weights[:, task, None, None] * (layer(x, task) - base) for task in range(3))
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    mixed.sum().backward()
    assert all(torch.isfinite(kernel.grad).all() for kernel in layer.kernels)
    ids = torch.tensor([2, 0, 0, 1])
    one_hot = TaskMixture(nn.functional.one_hot(ids, 3).float())
    torch.testing.assert_close(layer(x, one_hot), layer(x, ids), atol=1e-6, rtol=1e-6)
    with use_tasks(TaskMixture(weights)):
        torch.testing.assert_close(layer(x), mixed)
    with pytest.raises(ValueError, match="'auto' is for calls of a whole adapted model"):
        layer(x, "auto")
    with use_tasks("auto"), pytest.raises(ValueError, match="'auto' is for calls of a whole adapted model"):
        layer(x)
    with pytest.raises(ValueError, match="one id for each of the 4 samples of x"):
        layer(x, TaskMixture(weights[:3]))
    with pytest.raises(TypeError, match="TaskMixture, which has no embedding of its own"):
        layer.route(TaskMixture(weights))
    layer.merge(0)
    with pytest.raises(ValueError, match="got a mixture of tasks"):
        layer(x, TaskMixture(weights))


@pytest.mark.parametrize("weights", [[[1.0, 0.0]], torch.ones(2, 2, dtype=torch.long), torch.ones(3)])
def test_a_bad_mixture_is_refused(weights: object) -> None:
    with pytest.raises((TypeError, ValueError), match="weights must be"):
        TaskMixture(weights)


def test_no_task_may_be_called_auto() -> None:
    with pytest.raises(ValueError, match='task_names must not hold "auto"'):
        EPTConfig(task_names=["auto", "cola"])


def test_three_tasks_added_one_after_the_other_are_three_rows() -> None:
    table = TaskTable(2, 4)
    for count in (3, 4, 5):
        before = table.weight.detach().clone()
        assert table.add_task(None, like=0) == count - 1
        assert torch.equal(table.weight, torch.cat([before, before[:1]]))
        assert [row.requires_grad for row in table.row_parameters("weight")] == [False, True]
