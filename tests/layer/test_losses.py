"""The contrastive task loss and what it pools: against a version written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pyramid_testing import shake
from torch import Tensor, nn

from ept import EPTConfig, EPTLinear, TaskTable, contrastive_loss, row_layout, use_tasks
from ept.context import TaskContext
from ept.prototypes import masked_mean
from ept.task_table import contrastive_task_loss

TASKS, DIM = 3, 6


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def table() -> TaskTable:
    torch.manual_seed(0)
    return TaskTable(TASKS, DIM, dtype=torch.float64)


def by_hand(pooled: list[Tensor], tasks: list[int], table: Tensor, temperature: float) -> Tensor:
    """Mean over layers and samples of ``-log(exp(cos(z, e_t) / tau) / sum_u exp(cos(z, e_u) / tau))``."""
    terms = []
    for layer in pooled:
        for z, task in zip(layer, tasks, strict=True):
            cosines = [(z @ e) / (z.norm() * e.norm()) for e in table]
            exponentials = [torch.exp(cosine / temperature) for cosine in cosines]
            terms.append(-torch.log(exponentials[task] / sum(exponentials)))
    return sum(terms) / len(terms)


# --- masked_mean ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_masked_mean_by_hand(dtype: torch.dtype) -> None:
    x = rows(3, 4, DIM)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=dtype)
    pooled = masked_mean(x, mask)
    expected = torch.stack([x[0, :2].mean(0), x[1].mean(0), x[2, 3]])
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-14)


def test_masked_mean_without_tokens_gives_zeros() -> None:
    mask = torch.tensor([[0, 0], [1, 0]])
    pooled = masked_mean(rows(2, 2, DIM), mask)
    assert not pooled[0].any()
    torch.testing.assert_close(pooled[1], rows(2, 2, DIM)[1, 0])


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5), torch.ones(3, 4), torch.zeros(2, 4, 1)])
def test_masked_mean_ignores_a_mask_of_another_shape(mask: Tensor | None) -> None:
    x = rows(2, 4, DIM)
    torch.testing.assert_close(masked_mean(x, mask), x.mean(1))


@pytest.mark.parametrize("mask", [None, torch.ones(2, 300)])
def test_masked_mean_accumulates_in_fp32(mask: Tensor | None) -> None:
    x = torch.full((2, 300, 1), 1.01).bfloat16()
    pooled = masked_mean(x, mask)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, x[:, 0].float())


# --- contrastive_task_loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("form", ["tensor", "int", "scalar"])
def test_loss_by_hand_with_its_gradient(table: TaskTable, form: str, temperature: float, layers: int) -> None:
    pooled = [rows(4, DIM, seed=layer) for layer in range(layers)]
    tasks = [2, 0, 1, 2] if form == "tensor" else [2] * 4
    given = {"tensor": torch.tensor(tasks), "int": 2, "scalar": torch.tensor(2)}[form]
    loss = contrastive_task_loss(pooled, given, table, temperature)
    assert loss.shape == ()
    expected = by_hand(pooled, tasks, table.weight, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, table.weight)[0] for value in (loss, expected)), rtol=1e-10, atol=1e-12
    )


def test_loss_is_small_where_representations_sit_on_their_embeddings(table: TaskTable) -> None:
    table.weight.data = torch.eye(TASKS, DIM, dtype=torch.float64)
    tasks = torch.arange(TASKS)
    near = contrastive_task_loss([3 * table.weight.detach()], tasks, table, 0.05)
    far = contrastive_task_loss([table.weight.detach()], tasks.roll(1), table, 0.05)
    assert near < 0.1 < math.log(TASKS) < far


def test_nothing_pooled_gives_an_attached_zero(table: TaskTable) -> None:
    loss = contrastive_task_loss([], 0, table, 0.05)
    assert loss.item() == 0
    loss.backward()
    assert not table.weight.grad.any()


@pytest.mark.parametrize(
    "tasks", [0, torch.tensor(1), torch.tensor([], dtype=torch.long)], ids=["int", "scalar", "rows"]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_an_empty_batch_gives_an_attached_zero(table: TaskTable, layers: int, tasks: int | Tensor) -> None:
    loss = contrastive_task_loss([rows(0, DIM)] * layers, tasks, table, 0.05)
    assert loss.item() == 0
    loss.backward()
    assert not table.weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_never_below_fp32(dtype: torch.dtype, table_dtype: torch.dtype, autocast: bool) -> None:
    """Logits are multiplied by 20: in bf16 they would be worth two digits."""
    table = TaskTable(TASKS, DIM, dtype=table_dtype)
    pooled = [rows(4, DIM, dtype=dtype)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = contrastive_task_loss(pooled, torch.tensor([0, 1, 2, 0]), table, 0.05)
    assert loss.dtype == torch.float32
    exact = by_hand([pooled[0].double()], [0, 1, 2, 0], table.weight.double(), 0.05)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_zero_representation_gives_no_nan(table: TaskTable) -> None:
    loss = contrastive_task_loss([torch.zeros(2, DIM, dtype=torch.float64)], 1, table, 0.05)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(TASKS))
    assert table.weight.grad.isfinite().all()


# --- what layers collect ----------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Query and key read the same tensor, ``up`` their sum; ``down`` reads another width than the embeddings'."""

    def __init__(self) -> None:
        super().__init__()
        config = EPTConfig(r=2, kernel_sizes=(2, 3), top_k=1, num_tasks=TASKS, task_embedding_dim=DIM)
        self.table = TaskTable(TASKS, DIM, dtype=torch.float64)
        sizes = {"query": (DIM, DIM), "key": (DIM, DIM), "up": (DIM, 9), "down": (9, DIM)}
        for name, (inputs, outputs) in sizes.items():
            layer = EPTLinear(inputs, outputs, config=config, task_table=self.table, dtype=torch.float64)
            self.add_module(name, layer)
        shake(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.query(x) + self.key(x)
        return self.down(self.up(hidden))


def test_layers_of_the_right_width_are_pooled_once_a_tensor() -> None:
    torch.manual_seed(0)
    model, x = Model(), rows(2, 4, DIM).requires_grad_()
    mask, tasks = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), [2, 0]
    with use_tasks(tasks, mask) as context:
        output = model(x)
    with use_tasks(tasks):
        hidden = (model.query(x) + model.key(x)).detach()
    pooled = [masked_mean(x.detach(), mask), masked_mean(hidden, mask)]
    assert len(context.pooled) == 2
    for actual, expected in zip(context.pooled, pooled, strict=True):
        torch.testing.assert_close(actual, expected)
    loss = contrastive_loss(context, model.table)
    torch.testing.assert_close(loss, by_hand(pooled, tasks, model.table.weight, 0.05), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        contrastive_loss(context, model.table, 0.5), by_hand(pooled, tasks, model.table.weight, 0.5)
    )

    leaves = {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    reached = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None]
    assert reached == ["table.weight"], "the representations are detached"
    output.sum().backward()
    assert x.grad.any(), "the output's own gradient still flows"


def test_rows_without_a_sequence_are_taken_as_they_are() -> None:
    model, x = Model(), rows(4, DIM)
    with use_tasks([0, 1, 2, 0]) as context:
        model.query(x)
    assert torch.equal(context.pooled[0], x)


def test_an_explicit_argument_collects_nothing() -> None:
    model, x = Model(), rows(4, 2, DIM)
    with use_tasks(1) as context:
        model.query(x, 1)
    assert context.pooled == []
    assert contrastive_loss(context, model.table).item() == 0


def test_names_work_as_in_the_layers() -> None:
    table = TaskTable(2, DIM, ["cola", "rte"], dtype=torch.float64)
    pooled = [rows(2, DIM)]
    by_name = contrastive_loss(TaskContext(["rte", "cola"], pooled=pooled), table)
    assert torch.equal(by_name, contrastive_loss(TaskContext([1, 0], pooled=pooled), table))


@pytest.mark.parametrize("tasks", [[2, 0], torch.tensor([2, 0]), 1])
@pytest.mark.parametrize("shape", [(6, DIM), (6, 3, DIM)])
def test_a_sample_that_became_several_keeps_its_task(tasks: object, shape: tuple[int, ...]) -> None:
    """Windows and flattened tokens, declared, are routed in whole multiples; their loss must follow the same rule."""
    model, x = Model(), rows(*shape)
    with use_tasks(tasks) as context, row_layout("rows"):
        model.query(x)
    loss = contrastive_loss(context, model.table)
    each = [tasks] * 6 if isinstance(tasks, int) else [int(task) for task in tasks for _ in range(3)]
    pooled = x if x.dim() == 2 else x.mean(1)
    torch.testing.assert_close(loss, by_hand([pooled], each, model.table.weight, 0.05))


def test_layers_may_see_different_multiples() -> None:
    model = Model()
    with use_tasks([2, 0]) as context:
        model.query(rows(2, 3, DIM))
        with row_layout("rows"):
            model.key(rows(4, 3, DIM))
    assert contrastive_loss(context, model.table).isfinite()


def test_a_context_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="table is missing: a TaskContext needs the TaskTable"):
        contrastive_loss(TaskContext(0, pooled=[]))


def test_a_model_without_ept_is_refused() -> None:
    with pytest.raises(ValueError, match="EPT"):
        contrastive_loss(nn.Linear(3, 3))
