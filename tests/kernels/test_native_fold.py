"""The native router and fold against plain float64 operations: values, gradients, and when it steps aside."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from pyramid_testing import Recorder, assert_all_match, poisoned_memory
from torch import Tensor
from torch.autograd import forward_ad

from ept_kernels import PyramidGeometry, active_scales, fold_kernels, native, native_fold

missing = native.unsupported(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(missing is not None, reason=f"no native CPU backend: {missing}")

SCALING = 4.0


class Layer:
    """Parameters of one layer with random sizes."""

    def __init__(self, seed: int, top_k: int | None = None) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        sizes = tuple(rng.choice((1, 2, 3, 4, 6, 8, 11)) for _ in range(rng.randint(1, 9)))
        self.geometry = PyramidGeometry(rng.randint(11, 40), rng.randint(11, 40), 2, sizes, rng.random() < 0.5)
        self.top_k = top_k or rng.randint(1, len(sizes))
        dim, tasks = rng.choice((1, 7, 16, 50)), rng.randint(1, 6)
        self.parameters = (
            torch.randn(len(sizes), dim),
            torch.randn(tasks, dim),
            *(torch.randn(k, k) for k in sizes),
        )
        self.tasks = rng.choice((rng.randrange(tasks), torch.randint(tasks, (rng.randint(0, 9),)), None))
        rows = len(self.tasks) if isinstance(self.tasks, Tensor) else tasks if self.tasks is None else 1
        self.cotangent = torch.randn(rows, self.geometry.folded_size)

    def results(self, fold, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        leaves = [p.detach().requires_grad_() for p in parameters]
        folded, active = fold(self, *leaves)
        gradients = torch.autograd.grad(folded, leaves, self.cotangent.to(folded.dtype), materialize_grads=True)
        names = ("gate", "table", *(f"kernel {e}" for e in range(len(leaves) - 2)))
        return {"folded": folded.detach(), "active": active, **dict(zip(names, gradients, strict=True))}


def by_native(layer: Layer, gate: Tensor, table: Tensor, *kernels: Tensor) -> tuple[Tensor, Tensor]:
    return native_fold.fold_tasks(gate, table, layer.tasks, kernels, layer.top_k, SCALING, layer.geometry)


def by_definition(layer: Layer, gate: Tensor, table: Tensor, *kernels: Tensor) -> tuple[Tensor, Tensor]:
    tasks = layer.tasks
    rows = table if tasks is None else table[[tasks]] if isinstance(tasks, int) else table[tasks]
    logits = rows @ gate.T
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(layer.top_k).indices, True)
    gates = logits.masked_fill(~chosen, -torch.inf).softmax(1)
    if layer.top_k == 1:
        full = logits.softmax(1).masked_fill(~chosen, 0)
        gates = gates.detach() + full - full.detach()
    return fold_kernels(kernels, gates, SCALING, layer.geometry), active_scales(chosen, layer.geometry)


def compare(layer: Layer) -> None:
    exact = layer.results(by_definition, [p.double() for p in layer.parameters])
    with poisoned_memory():
        results = layer.results(by_native, layer.parameters)
    assert torch.equal(results.pop("active"), exact.pop("active"))
    assert_all_match(results, exact, 1e-5)


@pytest.mark.parametrize("seed", range(60))
def test_it_matches_the_definition(seed: int) -> None:
    compare(Layer(seed))


@pytest.mark.parametrize("seed", range(20))
def test_one_expert_passes_its_gradient_straight_through(seed: int) -> None:
    compare(Layer(seed, top_k=1))


def test_without_gradients_the_values_are_the_same() -> None:
    layer = Layer(3)
    with torch.no_grad():
        folded, active = by_native(layer, *layer.parameters)
    expected = layer.results(by_native, layer.parameters)
    assert torch.equal(folded, expected["folded"])
    assert torch.equal(active, expected["active"])
    assert not folded.requires_grad


@pytest.mark.parametrize("wanted", ["gate", "table", "kernel"])
def test_only_the_gradients_asked_for(wanted: str) -> None:
    layer = Layer(5)
    index = ("gate", "table", "kernel").index(wanted)
    leaves = [p.clone().requires_grad_(i == index) for i, p in enumerate(layer.parameters)]
    by_native(layer, *leaves)[0].backward(layer.cotangent)
    full = list(layer.results(by_native, layer.parameters).values())[2:]
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) if i != index else torch.equal(leaf.grad, full[i])


def test_ties_go_to_the_first_expert() -> None:
    geometry = PyramidGeometry(16, 16, 2, (2, 4, 4))
    kernels = [torch.ones(k, k) for k in geometry.kernel_sizes]
    folded, active = native_fold.fold_tasks(torch.ones(3, 5), torch.ones(1, 5), 0, kernels, 2, 1.0, geometry)
    assert active.tolist() == [[True, True]]
    assert torch.equal(folded, torch.cat([torch.full((1, 4), 0.5), torch.full((1, 16), 0.25)], dim=1))


def test_nan_shows() -> None:
    layer = Layer(7)
    gate, *others = layer.parameters
    gate = gate.clone()
    gate[0] = torch.nan
    with torch.no_grad():
        folded, _ = by_native(layer, gate, *others)
    assert folded.isnan().any(1).all()


@pytest.mark.parametrize("tasks", [-1, 3, torch.tensor([0, 3])])
def test_a_task_that_the_table_lacks_is_refused(tasks: int | Tensor) -> None:
    geometry = PyramidGeometry(16, 16, 2, (2,))
    with pytest.raises(IndexError, match=r"task_ids holds (-1|3); allowed: 0 to 2"):
        native_fold.fold_tasks(torch.ones(1, 5), torch.ones(3, 5), tasks, [torch.ones(2, 2)], 1, 1.0, geometry)


def test_a_second_derivative_is_refused() -> None:
    layer = Layer(5)
    leaves = [p.clone().requires_grad_() for p in layer.parameters]
    (gradient,) = torch.autograd.grad(by_native(layer, *leaves)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtypes_and_devices_are_not_its_own(dtype: torch.dtype) -> None:
    """transformers sets a default dtype while it loads a model, accelerate a default device."""
    layer = Layer(3)
    expected = layer.results(by_native, layer.parameters)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            results = layer.results(by_native, layer.parameters)
    finally:
        torch.set_default_dtype(before)
    for name, value in results.items():
        assert value.device.type == "cpu"
        assert torch.equal(value, expected[name]), name


def test_shapes_that_native_code_would_run_over_are_refused() -> None:
    geometry = PyramidGeometry(16, 16, 2, (2, 4))
    gate, table, kernels = torch.ones(2, 5), torch.ones(3, 5), [torch.ones(2, 2), torch.ones(4, 4)]

    def call(gate=gate, table=table, kernels=kernels, top_k=1) -> None:
        native_fold.fold_tasks(gate, table, 0, kernels, top_k, 1.0, geometry)

    call()
    with pytest.raises(ValueError, match=r"gate must be \[2 experts, d\], got \[3, 5\]"):
        call(gate=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"table must be \[tasks, d=5\], got \[3, 4\]"):
        call(table=torch.ones(3, 4))
    with pytest.raises(ValueError, match="top_k must be from 1 to 2, got 3"):
        call(top_k=3)
    with pytest.raises(ValueError, match=r"kernels must be \[k, k\] with k in \(2, 4\), got \[\[4, 4\], \[2, 2\]\]"):
        call(kernels=kernels[::-1])


def test_batched_gradients_are_refused_by_name() -> None:
    layer = Layer(3)
    leaves = [p.clone().requires_grad_() for p in layer.parameters]
    folded, _ = by_native(layer, *leaves)
    with pytest.raises(RuntimeError, match="cannot be batched"):
        torch.autograd.grad(folded, leaves[0], torch.stack([layer.cotangent] * 2), is_grads_batched=True)


def test_it_serves_plain_fp32_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPT_BACKEND", raising=False)
    plain = torch.ones(3, 4)
    assert native_fold.serves(plain, torch.nn.Parameter(plain))
    assert not native_fold.serves(plain.double())
    assert not native_fold.serves(plain.bfloat16())
    assert not native_fold.serves(plain, plain.T)
    assert not native_fold.serves(plain.to("meta"))
    with Recorder():
        assert not native_fold.serves(plain)
    with forward_ad.dual_level():
        assert not native_fold.serves(plain)
    monkeypatch.setenv("EPT_BACKEND", "torch")
    assert not native_fold.serves(plain)
