"""Every plan under ``torch.compile`` and in CUDA graphs: no graph break, no value read back to the host."""

from __future__ import annotations

import pytest
import torch
from gpu_testing import PAPER, PLANS, capture, force, launched, like_a_layer, on_gpu
from pyramid_testing import Case, Problem, assert_matches, assert_same_bits, shake

import ept_kernels
from ept import EPTConfig, EPTLinear
from ept_kernels import PyramidGeometry

NAMES = ("x", "A", "B", "folded")


@pytest.fixture
def problem() -> Problem:
    case = Case(PyramidGeometry(768, 512, 8, PAPER), (4, 96), "sample", 3)
    return like_a_layer(on_gpu(case.tensors(torch.bfloat16, adapter_dtype=torch.float32)))


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(request.param, monkeypatch, torch.bfloat16)
    return request.param


def leaves_of(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: getattr(problem, name).detach().clone().requires_grad_() for name in NAMES}


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
def test_compiles_in_one_graph(problem: Problem, plan: str, options: dict) -> None:
    expected = problem.evaluate(ept_kernels, "pyramid_linear", wanted=NAMES)
    leaves = leaves_of(problem)

    def layer(**tensors: torch.Tensor) -> torch.Tensor:
        return 2 * problem.call(ept_kernels, "pyramid_linear", **tensors)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, **options)
    for _ in range(3):  # graphs are recorded at the second call
        output = compiled(**leaves)
        result = output.detach().clone()
        gradients = torch.autograd.grad(output, list(leaves.values()), problem.cotangent / 2)
    assert_matches(result / 2, expected["output"], 1e-2)
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert_matches(gradient, expected[name], 1e-2, name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_captures_in_a_cuda_graph(problem: Problem, plan: str, dropout_p: float) -> None:
    """Forward and backward replayed on new rows and new routing; a read of a value would end the capture."""
    leaves = leaves_of(problem)

    def step() -> tuple[torch.Tensor, ...]:
        adapter = (leaves["A"], leaves["B"], leaves["folded"], problem.groups, problem.geometry)
        arguments = (leaves["x"], problem.weight, problem.bias, *adapter)
        output = ept_kernels.pyramid_linear(*arguments, dropout_p=dropout_p)
        return (output.detach(), *torch.autograd.grad(output, list(leaves.values()), problem.cotangent))

    graph, captured = capture(step)
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
        problem.groups.copy_(problem.groups.flip(0))
    graph.replay()
    first = [value.clone() for value in captured]
    if dropout_p:
        graph.replay()
        assert not torch.equal(first[0], captured[0]), "another replay, another mask"
        return
    for value, expected in zip(first, step(), strict=True):
        assert_same_bits(value.cpu(), expected.cpu())


def test_graphed_callables(plan: str) -> None:
    """A layer through ``torch.cuda.make_graphed_callables``: the same output and gradients as eager."""
    torch.manual_seed(0)
    layer = shake(EPTLinear(768, 512, config=EPTConfig(num_tasks=3), device="cpu"), std=0.1).cuda().bfloat16()
    x = torch.randn(8, 64, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    class OneTask(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.layer(rows, 1)

    module = OneTask()
    output = module(x)
    cotangent = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, cotangent)
    graphed = torch.cuda.make_graphed_callables(module, (x.detach().clone().requires_grad_(),))
    result = graphed(x)
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    assert_matches(result.detach(), output.detach(), 1e-2)
    assert_matches(gradient, expected, 1e-2)


def test_launches(problem: Problem, plan: str) -> None:
    """What the profiler counts on the device: the small kernels once each, and few others."""
    if plan == "torch":
        pytest.skip("plain torch launches an operation at a time")
    leaves = leaves_of(problem)
    outputs = []
    for _ in range(2):  # the first call compiles
        forward = launched(lambda: outputs.append(problem.call(ept_kernels, "pyramid_linear", **leaves)))
        backward = launched(lambda: torch.autograd.grad(outputs[-1], list(leaves.values()), problem.cotangent))
    # Ours, and the library's products, each of which may take a reduction of its own.
    assert len(forward) <= 2 + 3 * 2, forward
    assert len(backward) <= 4 + 5 * 2, backward
    assert [sum("interleave" in name for name in names) for names in (forward, backward)] == [1, 0]
    assert [sum("gather" in name for name in names) for names in (forward, backward)] == [0, 1]
