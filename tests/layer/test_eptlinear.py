"""``EPTLinear`` against its definition, and as a drop-in for ``nn.Linear`` in all that a training loop does to one."""

from __future__ import annotations

import copy
import io
import pickle
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from pyramid_testing import (
    HOST_READS,
    Recorder,
    assert_matches,
    assert_same_bits,
    examples,
    expected_delta_weight,
    expected_gates,
    expected_output,
    from_seed,
    random_geometry,
    shake,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ept import EPTConfig, EPTLinear, TaskTable, row_layout, use_tasks
from ept.recompute import checkpoint_with_tasks
from ept_kernels import PyramidGeometry

NAMES = ["cola", "mrpc", "rte", "stsb"]


def make_config(**changes: object) -> EPTConfig:
    defaults = {
        "r": 3,
        "lora_alpha": 5,
        "kernel_sizes": (2, 3, 2, 4),
        "top_k": 2,
        "num_tasks": 4,
        "task_embedding_dim": 6,
    }
    return EPTConfig(**{**defaults, **changes})


def make_layer(in_features: int = 11, out_features: int = 7, *, bias: bool = True, dtype=None, **changes) -> EPTLinear:
    """A layer whose every adapter parameter is random."""
    torch.manual_seed(0)
    return shake(EPTLinear(in_features, out_features, bias, config=make_config(**changes), dtype=dtype))


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def double_parameters(layer: EPTLinear) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}


# --- values and gradients ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """An EPTLinear and a call of it."""

    geometry: PyramidGeometry
    top_k: int
    num_tasks: int
    dim: int
    lead: tuple[int, ...]
    tasks: tuple[int, ...]
    form: str
    bias: bool
    seed: int

    def task_ids(self) -> object:
        forms: dict[str, Callable[[], object]] = {
            "tensor": lambda: torch.tensor(self.tasks, dtype=torch.long),
            "list": lambda: list(self.tasks),
            "names": lambda: [f"task {task}" for task in self.tasks],
            "one": lambda: self.tasks[0],
            "one name": lambda: f"task {self.tasks[0]}",
            "scalar": lambda: torch.tensor(self.tasks[0]),
        }
        return forms[self.form]()

    def layer(self, dtype: torch.dtype) -> tuple[EPTLinear, EPTConfig]:
        g = self.geometry
        config = EPTConfig(
            r=g.rank,
            lora_alpha=3.5,
            kernel_sizes=g.kernel_sizes,
            top_k=self.top_k,
            task_names=[f"task {task}" for task in range(self.num_tasks)],
            alp_scaling=g.alp_scaling,
            task_embedding_dim=self.dim,
        )
        layer = EPTLinear(g.in_features, g.out_features, self.bias, config=config, dtype=dtype)
        return shake(layer, self.seed), config


def random_call(rng: random.Random) -> Call:
    geometry = random_geometry(rng, largest=20)
    num_tasks = rng.randint(1, 5)
    form = rng.choice(("tensor", "tensor", "list", "names", "one", "one name", "scalar"))
    several = form in ("tensor", "list", "names")
    batch = rng.choice((0, 1, 2, 2, 3, 4, 7) if several else (1, 2, 5))
    tasks = [rng.randrange(num_tasks) for _ in range(batch)]
    return Call(
        geometry=geometry,
        top_k=rng.randint(1, len(geometry.kernel_sizes)),
        num_tasks=num_tasks,
        dim=rng.randint(1, 6),
        lead=(batch, *rng.choice(((), (1,), (3,), (3,), (0,), (2, 2)))),
        tasks=tuple(tasks if several else tasks[:1] * batch),
        form=form,
        bias=rng.random() < 0.5,
        seed=rng.randrange(1000),
    )


def check_against_the_definition(call: Call, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(call.seed)
    layer, config = call.layer(dtype)
    x = rows(*call.lead, call.geometry.in_features, dtype=dtype, seed=call.seed).requires_grad_()
    output = layer(x, call.task_ids())
    cotangent = rows(*output.shape, dtype=dtype, seed=call.seed + 1)
    output.backward(cotangent)

    parameters, exact_x = double_parameters(layer), x.detach().double().requires_grad_()
    exact = expected_output(parameters, config, exact_x, call.tasks)
    assert output.dtype == dtype
    assert_matches(output, exact, tolerance, "output")

    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    exact_leaves = {"x": exact_x, **trainable}
    gradients = [torch.zeros_like(leaf) for leaf in exact_leaves.values()]
    if exact.requires_grad:  # not where there is no sample
        gradients = torch.autograd.grad(
            exact, list(exact_leaves.values()), cotangent.double(), allow_unused=True, materialize_grads=True
        )
    actual = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.requires_grad}}
    largest = max(gradient.norm().item() for gradient in gradients)
    for (name, gradient), expected in zip(actual.items(), gradients, strict=True):
        assert gradient.shape == expected.shape, name
        # The router's gradient is a difference of nearly equal numbers where the softmax saturates, and any gradient
        # may be a sum that cancels: rounding is then measured against the largest gradient of the call.
        scale = largest if name in ("gate", "task_embeddings.weight") else max(expected.norm().item(), 0.03 * largest)
        assert (gradient.double() - expected).norm().item() <= tolerance * scale, name
    assert layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None


@given(from_seed(random_call))
@examples(80)
def test_equals_the_definition_in_float64(call: Call) -> None:
    check_against_the_definition(call, torch.float64, 1e-12)


@given(from_seed(random_call))
@examples(40)
def test_equals_the_definition_in_float32(call: Call) -> None:
    check_against_the_definition(call, torch.float32, 1e-5)


@pytest.mark.parametrize("batch", [2, 4, 5, 9])
def test_fewer_and_more_samples_than_tasks(batch: int) -> None:
    """Both ways to route: the samples, or every task once."""
    call = Call(
        PyramidGeometry(11, 7, 3, (2, 3, 2)),
        2,
        4,
        5,
        (batch, 3),
        tuple(3 - i % 4 for i in range(batch)),
        "tensor",
        True,
        0,
    )
    check_against_the_definition(call, torch.float64, 1e-12)


def test_a_mixed_batch_equals_the_runs_task_by_task() -> None:
    layer = make_layer(dtype=torch.float64)
    x, tasks = rows(6, 5, 11, dtype=torch.float64), torch.tensor([3, 0, 0, 2, 3, 1])
    mixed = layer(x, tasks)
    for i, task in enumerate(tasks.tolist()):
        assert_matches(mixed[i], layer(x[i : i + 1], task)[0], 1e-13)
    assert not torch.allclose(layer(x, 0), layer(x, 1)), "the tasks do differ"


@pytest.mark.parametrize("task", [0, 3, "rte"])
def test_delta_weight_is_the_gated_sum_of_kronecker_products(task: int | str) -> None:
    layer = make_layer(dtype=torch.float64, task_names=NAMES)
    index = task if isinstance(task, int) else NAMES.index(task)
    delta = layer.delta_weight(task)
    expected = expected_delta_weight(double_parameters(layer), make_config(task_names=NAMES), index, 7, 11)
    assert_matches(delta, expected, 1e-12)
    x = rows(4, 11, dtype=torch.float64)
    assert_matches(layer(x, task) - F.linear(x, layer.weight, layer.bias), x @ delta.T, 1e-12)
    delta.sum().backward()
    assert layer.A.grad.norm() > 0


def test_delta_weight_refuses() -> None:
    layer = make_layer(task_names=NAMES)
    with pytest.raises(ValueError, match="task_ids is missing"):
        layer.delta_weight()
    with pytest.raises(ValueError, match="unknown task 'qqp'"):
        layer.delta_weight("qqp")
    with pytest.raises(ValueError, match="task_ids holds 4"):
        layer.delta_weight(4)
    with pytest.raises(TypeError, match="task must be an id or a name, got Tensor"):
        layer.delta_weight(torch.tensor([0, 1]))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_route(top_k: int) -> None:
    layer = make_layer(dtype=torch.float64, top_k=top_k)
    parameters = double_parameters(layer)
    for given_ids, tasks in ((2, [2]), ([3, 1, 1], [3, 1, 1]), (torch.arange(4), range(4)), (torch.tensor(1), [1])):
        index, gates = layer.route(given_ids)
        assert index.shape == gates.shape == (len(tasks), top_k)
        for row, task in enumerate(tasks):
            embedding = parameters["task_embeddings.weight"][task]
            expected = expected_gates(parameters["gate"], embedding, top_k)
            assert index[row].tolist() == [expert for expert, _ in expected]
            assert gates[row].tolist() == pytest.approx([gate.item() for _, gate in expected], rel=1e-12)
    with pytest.raises(ValueError, match="task_ids is missing"):
        layer.route()


# --- initialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_seed", ["gaussian", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(11,), (5, 11), (2, 3, 11), (2, 3, 2, 11), (0, 11)])
def test_exact_no_op_at_first(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, init_seed: str) -> None:
    linear = nn.Linear(11, 7, bias, dtype=dtype)
    layer = EPTLinear.from_linear(linear, make_config(init_seed=init_seed))
    x = rows(*shape, dtype=dtype)
    tasks = [i % 4 for i in range(shape[0] if len(shape) > 1 else 1)]
    for task_ids in (0, 3, torch.tensor(tasks, dtype=torch.long)):
        assert torch.equal(layer(x, task_ids), linear(x))
        assert torch.equal(layer.eval()(x, task_ids), linear(x))


@pytest.mark.parametrize("make", [EPTLinear, lambda i, o, config: EPTLinear.from_linear(nn.Linear(i, o), config)])
def test_initial_values(make: Callable[..., EPTLinear]) -> None:
    torch.manual_seed(0)
    layer = make(96, 64, config=make_config(r=8))
    assert not any(kernel.any() for kernel in layer.kernels)
    for values in (layer.A.detach(), layer.B.detach()):
        assert values.mean().abs() < 0.2 * values.std(), "centred"
        assert 0.55 < (values.abs() < values.std()).double().mean() < 0.8, "Gaussian: 68% within one deviation"
    assert layer.gate.all()
    assert layer.task_embeddings.weight.all()
    assert not make(96, 64, config=make_config(init_seed="zero")).B.any()


@pytest.mark.parametrize("init_seed", ["gaussian", "zero"])
def test_a_fresh_layer_can_learn(init_seed: str) -> None:
    """At the start some adapter parameter has a gradient: a product of two zeros would stay zero for ever."""
    torch.manual_seed(0)
    layer = EPTLinear(11, 7, config=make_config(init_seed=init_seed))
    layer(rows(4, 11), 0).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_reset_parameters_is_a_fresh_start() -> None:
    layer = make_layer()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    torch.manual_seed(1)
    layer.reset_parameters()
    assert not any(kernel.any() for kernel in layer.kernels)
    for name in ("A", "B", "gate", "weight", "bias"):
        assert not torch.equal(getattr(layer, name), before[name]), name


# --- a drop-in for nn.Linear ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_attributes_of_a_linear(bias: bool) -> None:
    linear, layer = nn.Linear(11, 7, bias), EPTLinear(11, 7, bias, config=make_config())
    for name in ("in_features", "out_features"):
        assert getattr(layer, name) == getattr(linear, name)
    assert layer.weight.shape == linear.weight.shape
    assert (layer.bias is None) == (linear.bias is None)
    assert isinstance(layer.weight, nn.Parameter)
    assert "in_features=11, out_features=7" in repr(layer)
    assert not layer.merged
    incompatible = layer.load_state_dict(linear.state_dict(), strict=False)
    assert not incompatible.unexpected_keys
    assert torch.equal(layer(rows(3, 11), 0), linear(rows(3, 11)))


def test_shapes_of_the_adapter() -> None:
    layer = EPTLinear(11, 7, config=make_config())
    assert layer.A.shape == (3, 6)
    assert layer.B.shape == (4, 3)
    assert [list(kernel.shape) for kernel in layer.kernels] == [[2, 2], [3, 3], [2, 2], [4, 4]]
    assert layer.gate.shape == (4, 6)
    assert layer.task_embeddings.weight.shape == (4, 6)


def test_only_the_adapter_is_trainable() -> None:
    layer = EPTLinear(11, 7, config=make_config())
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {"weight", "bias"}
    kernels = {f"kernels.{i}" for i in range(4)}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "A", "B", "gate", "task_embeddings.weight", *kernels
    }  # fmt: skip


def test_parameter_count_of_the_paper() -> None:
    layer = EPTLinear(768, 768, config=EPTConfig())
    assert layer.A.numel() + layer.B.numel() + sum(kernel.numel() for kernel in layer.kernels) == 6384


def test_an_optimizer_moves_the_adapter_and_not_the_base() -> None:
    torch.manual_seed(0)
    layer = EPTLinear(11, 7, config=make_config(top_k=4))  # every expert: the kernels of others would not move
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    x, target = rows(16, 11), rows(16, 7, seed=1)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(layer(x, torch.arange(16) % 4), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_linear_shares_the_parameters(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(11, 7, bias, dtype=dtype).eval()
    layer = EPTLinear.from_linear(linear, make_config())
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.training
    assert not any(p.is_meta for p in layer.parameters())
    assert layer.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.A.std() > 0
    assert layer.gate.all()
    assert layer.task_embeddings.weight.all()
    with torch.no_grad():
        linear.weight.zero_()
    assert not layer.weight.any()


@pytest.mark.parametrize("module", [nn.Conv1d(11, 7, 1), nn.Identity(), nn.Bilinear(3, 4, 5)])
def test_from_linear_refuses_another_type(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"linear must be an nn.Linear, got {type(module).__name__}"):
        EPTLinear.from_linear(module, make_config())


def test_from_linear_changes_nothing_when_it_refuses() -> None:
    linear = nn.Linear(3, 11)
    with pytest.raises(ValueError, match=r"kernel_sizes holds the scale 4, larger than the layer .*in_features=3"):
        EPTLinear.from_linear(linear, make_config())
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad


def test_a_scale_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel_sizes holds the scale 4, larger than the layer .*allowed: 1 to 3"):
        EPTLinear(11, 3, config=make_config())


def test_layers_may_share_a_task_table() -> None:
    table = TaskTable(4, 6)
    first = EPTLinear(11, 7, config=make_config(), task_table=table)
    second = EPTLinear.from_linear(nn.Linear(7, 11), make_config(), task_table=table)
    assert first.task_table is second.task_table is table
    assert not any("task" in name for name in [*first.state_dict(), *second.state_dict()])
    assert not table.weight.is_meta
    shake(first), shake(second)
    second(first(rows(3, 11), 1), 1).sum().backward()
    assert table.weight.grad[1].any()
    with pytest.raises(ValueError, match=r"task_table has 4 tasks, but config.num_tasks is 3"):
        EPTLinear(11, 7, config=make_config(num_tasks=3), task_table=table)


def test_state_dict_round_trip() -> None:
    layer, other = make_layer(), EPTLinear(11, 7, config=make_config())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(other(rows(3, 11), [0, 1, 3]), layer(rows(3, 11), [0, 1, 3]))
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_are_equal_and_independent(clone: Callable[[EPTLinear], EPTLinear]) -> None:
    layer = make_layer()
    other = clone(layer)
    x = rows(3, 11)
    expected = layer(x, [0, 1, 3]).detach()
    assert_same_bits(other(x, [0, 1, 3]), expected)
    assert other.task_table is other.task_embeddings
    assert other.task_table is not layer.task_table
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert_same_bits(layer(x, [0, 1, 3]), expected)
    other(x, 0).sum().backward()
    assert other.task_embeddings.weight.grad is not None
    assert layer.A.grad is None


def test_a_deep_copy_of_a_model_keeps_its_table_shared() -> None:
    table = TaskTable(4, 6)
    layers = [EPTLinear(8, 8, config=make_config(), task_table=table) for _ in range(2)]
    model = copy.deepcopy(nn.ModuleList([table, *layers]))
    assert model[1].task_table is model[2].task_table is model[0]
    assert model[0] is not table


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_base_with_fp32_adapter(dtype: torch.dtype) -> None:
    layer = make_layer(24, 20, dtype=dtype)
    assert {p.dtype for p in (layer.weight, layer.bias)} == {dtype}
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    x = rows(4, 5, 24, dtype=dtype).requires_grad_()
    output = layer(x, [0, 3, 1, 1])
    cotangent = rows(4, 5, 20, dtype=dtype, seed=1)
    output.backward(cotangent)
    assert output.dtype == x.grad.dtype == dtype
    parameters, exact_x = double_parameters(layer), x.detach().double().requires_grad_()
    exact = expected_output(parameters, make_config(), exact_x, [0, 3, 1, 1])
    exact.backward(cotangent.double())
    tolerance = 8 * torch.finfo(dtype).eps
    assert_matches(output, exact, tolerance, "output")
    assert_matches(x.grad, exact_x.grad, tolerance, "x")
    for name, p in layer.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32
            assert_matches(p.grad, parameters[name].grad, 2 * tolerance, name)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_autocast_bf16(dropout: float) -> None:
    layer = make_layer(24, 20, lora_dropout=dropout)
    x = rows(4, 5, 24).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x, [0, 3, 1, 1])
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    if not dropout:
        exact = expected_output(double_parameters(layer), make_config(), x.double(), [0, 3, 1, 1])
        assert_matches(output, exact, 0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_converted_layer_still_works(dtype: torch.dtype) -> None:
    layer = make_layer().to(dtype)
    assert layer.task_table.weight.dtype == dtype
    output = layer(rows(3, 11, dtype=dtype), [0, 1, 3])
    assert output.dtype == dtype
    exact = expected_output(double_parameters(layer), make_config(), rows(3, 11, dtype=dtype).double(), [0, 1, 3])
    assert_matches(output, exact, 16 * torch.finfo(dtype).eps)


# --- task_ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_ids", "error", "message"),
    [
        (None, ValueError, "task_ids is missing: this adapter has 4 tasks"),
        (4, ValueError, "task_ids holds 4; allowed: 0 to 3"),
        (-1, ValueError, "task_ids holds -1; allowed: 0 to 3"),
        ("sst2", ValueError, "task_ids names the unknown task 'sst2'"),
        ([0, 1, 4], ValueError, "task_ids holds 4"),
        (torch.tensor([0, 1, 4]), ValueError, "task_ids holds an id out of range"),
        (torch.tensor([0, 1]), ValueError, r"one id for each of the 3 samples of x \[3, 2, 11\], got 2"),
        ([0, 1, 2, 3], ValueError, r"one id for each of the 3 samples of x \[3, 2, 11\], got 4"),
        ([0] * 6, ValueError, "one id for each of the 3 samples"),
        ([0], ValueError, "one id for each of the 3 samples"),
        ([], ValueError, "one id for each of the 3 samples"),
        (torch.zeros(3), TypeError, "task_ids must be an integer tensor"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "task_ids must be an integer tensor"),
        (1.0, TypeError, "task_ids must be an integer"),
        (True, TypeError, "task_ids must hold integers or names, got True"),
        (torch.zeros(3, 2, dtype=torch.long), ValueError, "scalar or 1-D"),
    ],
)
def test_bad_task_ids_are_named(task_ids: object, error: type[Exception], message: str) -> None:
    layer = make_layer(task_names=NAMES)
    with pytest.raises(error, match=message):
        layer(rows(3, 2, 11), task_ids)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_x_of_the_wrong_width_is_named(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"x must be \[..., in_features=11\], got \[3, 10\]"):
        make_layer(lora_dropout=dropout)(rows(3, 10), 0)


def test_one_task_needs_no_ids() -> None:
    layer = make_layer(num_tasks=1)
    x = rows(3, 11)
    expected = layer(x, 0)
    assert_same_bits(layer(x), expected)
    torch.testing.assert_close(layer(x, torch.zeros(3, dtype=torch.long)), expected)
    assert layer.route()[0].shape == (1, 2)
    assert layer.delta_weight().shape == (7, 11)
    with pytest.raises(ValueError, match="task_ids holds 1"):
        layer(x, 1)


def test_use_tasks_gives_the_ids() -> None:
    layer = make_layer(task_names=NAMES)
    x = rows(3, 11)
    for task_ids in (2, "rte", [0, 1, 3], torch.tensor([3, 3, 0])):
        with use_tasks(task_ids):
            assert_same_bits(layer(x), layer(x, task_ids))
    with use_tasks(1):
        with use_tasks(2):
            assert_same_bits(layer(x), layer(x, 2))
        assert_same_bits(layer(x), layer(x, 1))
        assert_same_bits(layer(x, 3), make_layer()(x, 3))  # the argument wins
    with pytest.raises(ValueError, match="task_ids is missing"):
        layer(x)


def test_a_sample_may_become_several_consecutive_ones_where_that_is_declared() -> None:
    """Windows and flattened tokens: whole multiples. An explicit argument is exact."""
    layer = make_layer()
    x, tasks = rows(6, 2, 11), torch.tensor([3, 0])
    with use_tasks(tasks):
        with pytest.raises(ValueError, match="one id for each of the 6 samples"):
            layer(x)
        with row_layout("rows"):
            assert_matches(layer(x), layer(x, tasks.repeat_interleave(3)), 1e-6)
            with pytest.raises(ValueError, match="one id for each of the 5 samples"):
                layer(x[:5])
    with pytest.raises(ValueError, match="one id for each of the 6 samples"):
        layer(x, tasks)


def test_threads_with_different_tasks_do_not_meet() -> None:
    """Each thread holds its context open while the others run."""
    layer = make_layer()
    x = rows(3, 11)
    expected = [layer(x, task).detach() for task in range(4)]
    barrier, results = threading.Barrier(4, timeout=60), [None] * 4

    def work(task: int) -> None:
        with use_tasks(task):
            for _ in range(5):
                barrier.wait()
                results[task] = layer(x).detach()

    threads = [threading.Thread(target=work, args=(task,)) for task in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, value in zip(results, expected, strict=True):
        assert_same_bits(result, value)


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_adapter_and_only_in_training() -> None:
    layer = make_layer(dtype=torch.float64, lora_dropout=0.5)
    x = rows(6, 11, dtype=torch.float64)
    torch.manual_seed(3)
    trained = layer(x, 1)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert_matches(trained, F.linear(x, layer.weight, layer.bias) + dropped @ layer.delta_weight(1).T, 1e-12)
    torch.manual_seed(4)
    assert not torch.allclose(layer(x, 1), trained)
    layer.eval()
    assert_matches(layer(x, 1), expected_output(double_parameters(layer), make_config(), x, [1] * 6), 1e-12)


# --- checkpointing ----------------------------------------------------------------------------------------------------


def gradients_of(layer: EPTLinear, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    layer.zero_grad()
    x = rows(3, 2, 11, dtype=torch.float64).requires_grad_()
    torch.manual_seed(5)
    run(x).square().sum().backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_replays_the_same_pass(dropout: float, reentrant: bool) -> None:
    layer = make_layer(dtype=torch.float64, lora_dropout=dropout)
    tasks = torch.tensor([3, 0, 1])
    plain = gradients_of(layer, lambda x: layer(x, tasks))
    replayed = gradients_of(layer, lambda x: checkpoint(layer, x, tasks, use_reentrant=reentrant))
    for name, gradient in plain.items():
        assert_matches(replayed[name], gradient, 1e-13, name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_use_tasks(reentrant: bool) -> None:
    """Recomputation runs in backward, after the block: with its tasks, whether the model was prepared or not."""
    layer = make_layer(dtype=torch.float64)
    layer._gradient_checkpointing_func = lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)

    def run(x: Tensor) -> Tensor:
        with use_tasks([3, 0, 1]):
            return layer._gradient_checkpointing_func(layer, x)

    plain = gradients_of(layer, lambda x: layer(x, [3, 0, 1]))
    for _ in range(3):  # not prepared; once is enough, twice does no harm
        with use_tasks(2):  # what surrounds backward must not matter
            replayed = gradients_of(layer, run)
        for found in (replayed, gradients_of(layer, run)):
            for name, gradient in plain.items():
                assert_matches(found[name], gradient, 1e-13, name)
        checkpoint_with_tasks(layer)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_ids", "changes"),
    [
        (torch.tensor([3, 0, 1]), {}),
        (torch.tensor([3, 0, 1]), {"top_k": 1, "num_tasks": 4}),
        (torch.tensor([0, 1, 1]), {"num_tasks": 2}),
        (2, {}),
        ("rte", {"task_names": NAMES}),
        (None, {"num_tasks": 1}),
        (2, {"lora_dropout": 0.5}),
    ],
    ids=["mixed", "top-1", "more samples than tasks", "one task", "by name", "no ids", "dropout"],
)
def test_compiles_in_one_graph(task_ids: object, changes: dict) -> None:
    layer = make_layer(dtype=torch.float64, **changes)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager = gradients_of(layer, lambda x: layer(x, task_ids))
    fast = gradients_of(layer, lambda x: compiled(x, task_ids))
    if not changes.get("lora_dropout"):
        for name, gradient in eager.items():
            scale = 1e-10 if name in ("gate", "task_embeddings.weight") else 1e-12
            assert_matches(fast[name], gradient, scale, name)


def test_a_compiled_layer_never_uses_a_stale_task() -> None:
    layer = make_layer()
    x = rows(3, 11)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    for task in (0, 2, 2, 1):
        with use_tasks(task):
            assert_matches(compiled(x), layer(x, task), 1e-6)
    with pytest.raises(ValueError, match="task_ids is missing"):
        compiled(x)


# --- no host synchronisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [3, 9], ids=["fewer samples than tasks", "more"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_value_is_read_back(top_k: int, batch: int) -> None:
    layer = make_layer(top_k=top_k)
    x, tasks = rows(batch, 2, 11).requires_grad_(), torch.arange(batch) % 4
    with Recorder() as recorder:
        layer(x, tasks).sum().backward()
    assert layer.gate.grad is not None
    names = recorder.names()
    assert "topk" in names
    assert "_assert_async" in names, "ids are checked on the device"
    assert not set(names) & set(HOST_READS)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_runs_on_tensors_without_values(dropout: float) -> None:
    """A fake tensor refuses ``.item()``, ``.tolist()``, ``.numpy()`` and branches on its values."""
    with FakeTensorMode():
        layer = EPTLinear(11, 7, config=make_config(lora_dropout=dropout))
        x, tasks = torch.randn(3, 2, 11, requires_grad=True), torch.zeros(3, dtype=torch.long)
        output = layer(x, tasks)
        output.sum().backward()
        assert output.shape == (3, 2, 7)
        assert layer.gate.grad.shape == layer.gate.shape
        with pytest.raises(DataDependentOutputException):
            output.sum().item()


def test_runs_on_the_meta_device_like_a_linear() -> None:
    layer = EPTLinear(11, 7, config=make_config(), device="meta")
    assert layer(torch.empty(3, 11, device="meta"), 0).shape == (3, 7)
