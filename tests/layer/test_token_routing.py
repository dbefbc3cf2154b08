"""``routing="token"``: every row selects its own experts by a gate on itself; against the definition in float64."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from pyramid_testing import (
    HOST_READS,
    Recorder,
    assert_matches,
    assert_same_bits,
    examples,
    expected_output,
    from_seed,
    poisoned_memory,
    random_geometry,
    shake,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ept import EPTConfig, EPTLinear, TaskTable, use_tasks
from ept.pyramid.router import FUSED_ROWS
from ept_kernels import PyramidGeometry


def make_config(**changes: object) -> EPTConfig:
    defaults = {"r": 3, "lora_alpha": 5, "kernel_sizes": (2, 3, 2, 4), "top_k": 2, "num_tasks": 4, "routing": "token"}
    return EPTConfig(**{**defaults, **changes})


def make_layer(dtype: torch.dtype | None = None, **changes: object) -> EPTLinear:
    torch.manual_seed(0)
    return shake(EPTLinear(11, 7, config=make_config(**changes), dtype=dtype))


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(layer: EPTLinear, config: EPTConfig, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and leaves, in float64: task routing with every row its own task, whose embedding is the row."""
    leaves = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    leaves["x"] = x.detach().double().requires_grad_()
    flat = leaves["x"].reshape(-1, x.shape[-1])
    output = expected_output({**leaves, "task_embeddings.weight": flat}, config, flat, range(len(flat)))
    return output.view(*x.shape[:-1], layer.out_features), leaves


@dataclass(frozen=True)
class Call:
    geometry: PyramidGeometry
    top_k: int
    lead: tuple[int, ...]
    contiguous: bool
    bias: bool
    seed: int


def random_call(rng: random.Random) -> Call:
    geometry = random_geometry(rng, largest=20)
    return Call(
        geometry=geometry,
        top_k=rng.randint(1, len(geometry.kernel_sizes)),
        lead=rng.choice(((), (1,), (7,), (13,), (0,), (2, 3), (0, 4), (2, 0), (2, 1, 3))),
        contiguous=rng.random() < 0.7,
        bias=rng.random() < 0.5,
        seed=rng.randrange(1000),
    )


def check_against_the_definition(call: Call, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(call.seed)
    g = call.geometry
    config = make_config(r=g.rank, kernel_sizes=g.kernel_sizes, top_k=call.top_k, alp_scaling=g.alp_scaling)
    layer = shake(EPTLinear(g.in_features, g.out_features, call.bias, config=config, dtype=dtype), call.seed)
    x = rows(*call.lead, g.in_features, dtype=dtype, seed=call.seed)
    if not call.contiguous:
        x = x.repeat_interleave(2, -1)[..., ::2]
    x.requires_grad_()
    with poisoned_memory():
        output = layer(x)
        cotangent = rows(*output.shape, dtype=dtype, seed=call.seed + 1)
        output.backward(cotangent)
    exact, leaves = by_definition(layer, config, x)
    assert output.dtype == dtype
    assert_matches(output, exact, tolerance, "output")
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    expected = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if exact.numel():
        expected = torch.autograd.grad(
            exact, list(leaves.values()), cotangent.double(), allow_unused=True, materialize_grads=True
        )
    actual = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.requires_grad}}
    largest = max(gradient.norm().item() for gradient in expected)
    for name, gradient in zip(leaves, expected, strict=True):
        error = (actual[name].double() - gradient).norm().item()
        # As for tasks: where a softmax saturates, the router's gradient is a difference of nearly equal numbers.
        scale = largest if name in ("gate", "x") else max(gradient.norm().item(), 0.03 * largest)
        assert error <= tolerance * scale, name


@given(from_seed(random_call))
@examples(60)
def test_equals_the_definition_in_float64(call: Call) -> None:
    check_against_the_definition(call, torch.float64, 1e-12)


@given(from_seed(random_call))
@examples(60)
def test_equals_the_definition_in_float32(call: Call) -> None:
    check_against_the_definition(call, torch.float32, 1e-5)


@pytest.mark.parametrize("count", [FUSED_ROWS - 1, FUSED_ROWS, FUSED_ROWS + 11])
def test_many_rows(count: int) -> None:
    layer, config = make_layer(), make_config()
    x = rows(count, 11)
    assert_matches(layer(x), by_definition(layer, config, x)[0], 1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradcheck(top_k: int) -> None:
    layer = make_layer(torch.float64, top_k=top_k)
    if top_k == 1:  # its value is constant: the straight-through gradient is no derivative, so all but the router's
        layer.gate.requires_grad_(False)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = rows(3, 11, dtype=torch.float64).requires_grad_(top_k > 1)
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_route_in_fp32(dtype: torch.dtype) -> None:
    layer = make_layer()
    wide = copy.deepcopy(layer).double()
    half = EPTLinear(11, 7, config=make_config(), dtype=dtype)
    half.load_state_dict(layer.state_dict())
    x = rows(13, 11, dtype=dtype)
    index, gates = half.route_tokens(x)
    exact_index, exact_gates = wide.route_tokens(x.double())
    assert gates.dtype == torch.float32
    assert torch.equal(index, exact_index)
    assert_matches(gates, exact_gates, 1e-6)
    wide.weight.data, wide.bias.data = half.weight.double(), half.bias.double()
    exact, output = wide(x.double()), half(x)
    plain = nn.functional.linear(x, half.weight, half.bias)
    exact_plain = nn.functional.linear(x.double(), wide.weight, wide.bias)
    limit = 2 * (plain.double() - exact_plain).norm() / exact_plain.norm() + torch.finfo(dtype).eps
    assert output.dtype == dtype
    assert_matches(output, exact, float(limit))


def test_autocast_does_not_reach_the_router() -> None:
    layer = make_layer()
    x = rows(5, 11)
    expected = layer.route_tokens(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, found = layer(x), layer.route_tokens(x)
    assert output.dtype == torch.bfloat16
    for value, plain in zip(found, expected, strict=True):
        assert_same_bits(value, plain)


def test_rows_do_not_see_each_other() -> None:
    """A token gets the same with other neighbours: padding does no harm."""
    layer = make_layer(torch.float64)
    x = rows(2, 5, 11, dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(2, 3, 11, dtype=torch.float64)], dim=1)
    assert_matches(layer(padded)[:, :5], layer(x), 1e-13)
    assert torch.isfinite(layer(padded)).all()


def test_tokens_of_a_sample_use_different_experts() -> None:
    index, gates = make_layer().route_tokens(rows(2, 40, 11))
    assert index.shape == gates.shape == (2, 40, 2)
    assert len({tuple(sorted(pair)) for pair in index[0].tolist()}) > 2
    assert_matches(gates.sum(-1), torch.ones(2, 40), 1e-6)


def test_ids_are_optional_and_change_nothing() -> None:
    layer = make_layer(task_names=["a", "b", "c", "d"])
    x = rows(3, 11)
    for task_ids in (2, "b", ["a", "a", "d"], torch.tensor([3, 0, 1])):
        assert_same_bits(layer(x, task_ids), layer(x))
    with use_tasks(["a", "b", "c"]) as context:
        assert_same_bits(layer(x), layer(x, 1))
    assert context.pooled == []
    with pytest.raises(ValueError, match="names the unknown task 'e'"):
        layer(x, "e")
    with pytest.raises(ValueError, match="one id for each of the 3 samples"):
        layer(x, [0, 1])


def test_dropout_acts_on_the_adapter_and_not_on_the_router() -> None:
    layer = make_layer(lora_dropout=0.5)
    x = rows(400, 11).requires_grad_()
    expected = layer.eval()(x.detach())
    torch.manual_seed(3)
    first = layer.train()(x)
    assert not torch.equal(first, expected)
    torch.manual_seed(3)
    assert_same_bits(layer(x), first)
    folded, *_ = layer.fold_for(x, None)
    assert_same_bits(folded, layer.eval().fold_for(x, None)[0])
    first.sum().backward()
    assert layer.gate.grad.abs().sum() > 0


def test_exact_no_op_at_first() -> None:
    layer = EPTLinear(11, 7, config=make_config())
    x = rows(5, 11)
    assert_same_bits(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_parameters() -> None:
    layer = make_layer()
    assert layer.gate.shape == (4, 11)
    assert sorted(n for n, p in layer.named_parameters() if p.requires_grad) == [
        "A",
        "B",
        "gate",
        *(f"kernels.{e}" for e in range(4)),
    ]
    assert layer.part_sizes() == {"seed": 3 * (6 + 4), "kernels": 4 + 9 + 4 + 16, "gates": 44}


def test_a_fresh_layer_can_learn() -> None:
    torch.manual_seed(0)
    layer = EPTLinear(11, 7, config=make_config())
    x, target = rows(64, 11), rows(64, 7, seed=1)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(clone) -> None:
    layer = make_layer()
    x = rows(5, 11)
    assert_same_bits(clone(layer)(x), layer(x))


def test_it_does_not_merge_and_says_so() -> None:
    layer = make_layer()
    for refused in (lambda: layer.merge(0), lambda: layer.delta_weight(0)):
        with pytest.raises(ValueError, match="chooses experts for every token, so no one weight does what it does"):
            refused()
    with pytest.raises(ValueError, match="gives experts to tokens, not to tasks"):
        layer.route([0, 1])
    with pytest.raises(ValueError, match="gives experts to tasks, not to tokens"):
        EPTLinear(11, 7, config=make_config(routing="task")).route_tokens(rows(2, 11))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 12), r"x must be \[..., in_features=11\], got \[3, 12\]"),
        (torch.tensor(1.0), r"x must be \[..., in_features=11\], got \[\]"),
        (torch.ones(3, 11, dtype=torch.long), "x must be a floating-point tensor"),
    ],
)
def test_a_bad_x_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer()(x)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="routing must be 'task' or 'token', got 'word'"):
        make_config(routing="word")
    with pytest.raises(ValueError, match="contrastive_weight must be 0 or left out with routing='token'"):
        make_config(contrastive_weight=0.5)
    with pytest.raises(ValueError, match="task_table must be left out with routing='token'"):
        EPTLinear(11, 7, config=make_config(), task_table=TaskTable(4, 6))
    assert make_config().contrastive_weight == 0
    assert EPTConfig().contrastive_weight > 0


@pytest.mark.parametrize("count", [3, FUSED_ROWS + 1])
def test_compiles_in_one_graph(count: int) -> None:
    layer = make_layer(torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        x = rows(count, 11, dtype=torch.float64).requires_grad_()
        layer.zero_grad()
        output = call(x)
        output.square().sum().backward()
        results.append([output, x.grad, layer.gate.grad, layer.A.grad])
    for fast, eager in zip(*reversed(results), strict=True):
        assert_matches(fast, eager, 1e-12)


@pytest.mark.parametrize("count", [3, FUSED_ROWS + 1])
def test_no_value_is_read_back(count: int) -> None:
    layer = make_layer()
    with Recorder() as recorder:
        layer(rows(count, 11).requires_grad_()).sum().backward()
    assert "topk" in recorder.names()
    assert not set(recorder.names()) & set(HOST_READS)


def test_runs_on_tensors_without_values() -> None:
    with FakeTensorMode():
        layer = EPTLinear(11, 7, config=make_config(lora_dropout=0.5))
        x = torch.randn(3, 2, 11, requires_grad=True)
        layer(x).sum().backward()
        assert layer.gate.grad.shape == layer.gate.shape
    layer = EPTLinear(11, 7, config=make_config(), device="meta")
    assert layer(torch.empty(3, 11, device="meta")).shape == (3, 7)


def test_from_linear_has_a_fresh_gate() -> None:
    linear = nn.Linear(11, 7)
    layer = EPTLinear.from_linear(linear, make_config())
    assert layer.gate.shape == (4, 11)
    assert torch.isfinite(layer.gate).all()
    assert_same_bits(layer(rows(5, 11)), linear(rows(5, 11)))
