"""The Triton kernels under ``torch.compile`` and in CUDA graphs: no graph break, no value read back to the host."""

from __future__ import annotations

import pytest
import torch
from gpu_testing import PAPER, PLANS, capture, launched, like_a_layer, on_gpu
from pyramid_testing import Case, Problem, assert_matches, assert_same_bits

import ept_kernels
from ept_kernels import PyramidGeometry

NAMES = ("x", "A", "B", "folded")


@pytest.fixture
def problem() -> Problem:
    case = Case(PyramidGeometry(768, 512, 8, PAPER), (4, 96), "sample", 3)
    return like_a_layer(on_gpu(case.tensors(torch.bfloat16, adapter_dtype=torch.float32)))


def leaves_of(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: getattr(problem, name).detach().clone().requires_grad_() for name in NAMES}


@pytest.mark.parametrize("plan", PLANS)
def test_compiles_in_one_graph(problem: Problem, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_TRITON_BASE", plan)
    expected = problem.evaluate(ept_kernels, "pyramid_linear", wanted=NAMES)
    leaves = leaves_of(problem)

    def layer(**tensors: torch.Tensor) -> torch.Tensor:
        return 2 * problem.call(ept_kernels, "pyramid_linear", **tensors)

    torch._dynamo.reset()
    output = torch.compile(layer, fullgraph=True)(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), problem.cotangent / 2)
    assert_matches(output.detach() / 2, expected["output"], 1e-2)
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert_matches(gradient, expected[name], 1e-2, name)


@pytest.mark.parametrize("plan", PLANS)
def test_captures_in_a_cuda_graph(problem: Problem, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward replayed on new rows and new routing; a read of a value would end the capture."""
    monkeypatch.setenv("EPT_TRITON_BASE", plan)
    leaves = leaves_of(problem)

    def step() -> tuple[torch.Tensor, ...]:
        output = problem.call(ept_kernels, "pyramid_linear", **leaves)
        return (output.detach(), *torch.autograd.grad(output, list(leaves.values()), problem.cotangent))

    graph, captured = capture(step)
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
        problem.groups.copy_(problem.groups.flip(0))
    graph.replay()
    for value, expected in zip(captured, step(), strict=True):
        assert_same_bits(value.cpu(), expected.cpu())


@pytest.mark.parametrize("plan", PLANS)
def test_launches(problem: Problem, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the profiler counts on the device: two launches forward, five backward, where the product is ours."""
    monkeypatch.setenv("EPT_TRITON_BASE", plan)
    leaves = leaves_of(problem)

    outputs = []
    for _ in range(2):  # the first call compiles
        forward = launched(lambda: outputs.append(problem.call(ept_kernels, "pyramid_linear", **leaves)))
        backward = launched(lambda: torch.autograd.grad(outputs[-1], list(leaves.values()), problem.cotangent))
    assert len(forward) <= (3 if plan == "split" else 2), forward
    assert len(backward) <= (6 if plan == "split" else 5), backward
