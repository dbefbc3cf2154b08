"""Each method's layer against its definition in float64: outputs, gradients, merging, counts, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from baselines_testing import CONFIGS, DELTAS, LAYERS, awaken_all, layer_reference
from torch import Tensor, nn

import ept

NAMES = list(LAYERS)
MERGING = list(DELTAS)


def make(name: str, in_features: int = 11, out_features: int = 7, dtype: torch.dtype = torch.float64, **options):
    layer = LAYERS[name](in_features, out_features, config=CONFIGS[name](**options), dtype=dtype)
    return awaken_all(layer)


def outcome(output: Tensor, leaves: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), gradients, strict=True)]
    return {"output": output.detach(), **dict(zip(leaves, zeros, strict=True))}


def compare(name: str, layer: nn.Module, x: Tensor, tasks: list[int], task_ids: object, tolerance: float) -> None:
    x = x.detach().requires_grad_()
    leaves = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    cotangent = torch.randn(*x.shape[:-1], layer.out_features, dtype=torch.float64)
    found = outcome(layer(x, task_ids), leaves, cotangent.to(x.dtype))
    wide = {n: p.detach().double().requires_grad_(n in leaves) for n, p in layer.named_parameters()}
    rows = x.detach().double().requires_grad_()
    expected_leaves = {"x": rows, **{n: p for n, p in wide.items() if n in leaves}}
    expected = outcome(layer_reference(name, wide, layer_config(layer, name), rows, tasks), expected_leaves, cotangent)
    for part, value in expected.items():
        error = (found[part].double() - value).norm()
        largest = max(value.norm().item(), 1e-3 * max(v.norm().item() for v in expected.values()), 1e-30)
        assert error <= tolerance * largest, f"{part}: {error / largest}"


def layer_config(layer: nn.Module, name: str):
    return CONFIGS[name](**getattr(layer, "options", {}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(1,), (3,), (3, 5), (2, 3, 4), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_layer_equals_its_definition(name: str, lead: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(sum(lead))
    layer = make(name, dtype=dtype)
    x = torch.randn(*lead, 22, dtype=dtype)[..., ::2]
    tasks = [(2 * i + 1) % 3 for i in range(lead[0])]
    compare(name, layer, x, tasks, torch.tensor(tasks, dtype=torch.long), tolerance)
    compare(name, layer, x, [1] * lead[0], 1, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_layer_starts_as_its_base(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(11, 7)
    x = torch.randn(4, 11)
    with torch.no_grad():
        expected = linear(x)
        layer = LAYERS[name].from_linear(linear, CONFIGS[name]())
        if name == "dcft":  # its factors start small, not at zero
            torch.testing.assert_close(layer(x, 1), expected, atol=1e-2, rtol=0)
        else:
            assert torch.equal(layer(x, 1), expected)
    assert layer.weight is linear.weight
    assert not linear.weight.requires_grad


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_is_exact_and_unmerging_restores_the_bits(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = make(name, dtype=dtype)
    original = layer.weight.clone()
    state = {n: p.detach().double() for n, p in layer.named_parameters()}
    for task in range(3):
        delta = DELTAS[name](state, CONFIGS[name](), task)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        found = layer.delta_weight(task).double()
        assert (found - delta).norm() <= tolerance * delta.norm()
        layer.merge(task)
        exact = (original.double() + delta).to(dtype)
        spacing = torch.finfo(dtype).eps * exact.abs().max()
        assert (layer.weight.double() - exact.double()).abs().max() <= 2 * spacing
        x = torch.randn(3, 11, dtype=dtype)
        assert torch.equal(layer(x, task), nn.functional.linear(x, layer.weight, layer.bias))
        assert torch.equal(layer.state_dict()["weight"], original)
        with pytest.raises(ValueError, match="already merged"):
            layer.merge(task)
        layer.unmerge()
        assert torch.equal(layer.weight, original)


def test_mixlora_says_why_it_does_not_merge() -> None:
    layer = make("mixlora")
    for attempt in (layer.merge, lambda: layer.delta_weight(0)):
        with pytest.raises(ValueError, match=r"chooses experts for every token.*can be neither merged nor exported"):
            attempt()


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("more", {"r": 8, "task_embedding_dim": 64}, 8 * (768 + 768) + 8 * 64),
        ("moelora", {"r": 16, "num_experts": 8}, 16 * (768 + 768)),
        ("dcft", {"kernel_size": 8}, 96 + 96 + 64),
        ("mixlora", {"r": 16, "num_experts": 8}, 8 * 16 * (768 + 768)),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, options: dict, count: int) -> None:
    layer = LAYERS[name](768, 768, config=CONFIGS[name](num_tasks=8, **options))
    assert sum(layer.part_sizes().values()) == count
    shared = {"more": 8 * 64, "moelora": 9 * 64 + 8 * 64, "dcft": 0, "mixlora": 8 * 768}[name]
    assert sum(layer.shared.part_sizes().values()) == shared
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == count + shared


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_base_keeps_an_fp32_adapter(name: str) -> None:
    torch.manual_seed(2)
    layer = make(name, dtype=torch.bfloat16)
    trained = {p.dtype for n, p in layer.named_parameters() if n not in ("weight", "bias")}
    assert trained == {torch.float32}
    x = torch.randn(3, 5, 11, dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).double()(x.double(), [0, 1, 2])
    found = layer(x, [0, 1, 2])
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    torch.manual_seed(3)
    layer = make(name, dtype=torch.float32)
    x = torch.randn(3, 5, 11)
    exact = layer(x, [0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, [0, 1, 2])
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_only_and_keeps_the_mean(name: str) -> None:
    torch.manual_seed(4)
    layer = make(name, lora_dropout=0.3)
    x = torch.randn(2, 11, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x, [0, 1]), layer(x, [0, 1]))
        exact = layer(x, [0, 1])
        layer.train()
        draws = torch.stack([layer(x, [0, 1]) for _ in range(4000)])
    deviation = draws.std(0) / 4000**0.5
    assert (draws.std(0) > 0).any()
    assert ((draws.mean(0) - exact).abs() < 6 * deviation + 1e-9).all()


@pytest.mark.parametrize("name", ["more", "moelora"])
def test_task_ids_are_needed_and_checked(name: str) -> None:
    layer = make(name, num_tasks=8, task_names=["a", "b", "c"])
    x = torch.randn(2, 11, dtype=torch.float64)
    assert torch.equal(layer(x, "b"), layer(x, 1))
    for ids, message in ((None, "task_ids is missing"), ("z", "unknown task 'z'"), ([0, 1, 2], "one id for each")):
        with pytest.raises(ValueError, match=message):
            layer(x, ids)
    with ept.use_tasks([2, 0]):
        assert torch.equal(layer(x), layer(x, ["c", "a"]))


@pytest.mark.parametrize("name", ["dcft", "mixlora"])
def test_methods_without_tasks_need_no_ids(name: str) -> None:
    layer = make(name)
    x = torch.randn(2, 11, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x, [1, 2]))


def test_moelora_drops_entries_of_every_expert_apart() -> None:
    """One expert's mask is not another's: with equal experts, one mask would make their shares equal."""
    torch.manual_seed(5)
    layer = make("moelora", lora_dropout=0.5).train()
    with torch.no_grad():
        layer.A.copy_(layer.A[:2].repeat(3, 1))
    hidden = layer.shrink(torch.randn(1, 11, dtype=torch.float64)).view(3, 2)
    assert not torch.allclose(hidden[0], hidden[1])


def test_more_uses_a_prefix_of_its_rank() -> None:
    torch.manual_seed(6)
    layer = make("more", r=4)
    for task in range(3):
        rank = int(layer.route(task)[0]) + 1
        core = layer.core(task)[0].detach()
        expected = torch.tensor([rank / 4 if i < rank else 0.0 for i in range(4)], dtype=torch.float64)
        torch.testing.assert_close(core, expected)
        assert torch.linalg.matrix_rank(layer.delta_weight(task)) == rank
