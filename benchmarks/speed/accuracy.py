"""Is a candidate right? Its output and gradients against its definition in float64.

The error of a tensor is ``||found - exact|| / ||exact||``. It may be 1e-5 in fp32; in bf16 and fp16 twice the error
that the definition itself makes when plain torch computes it in that dtype (EPT: fp32 parameters, dense updates cast to
the dtype of x). A tensor that is not finite is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from candidates import Candidate, Leaves
from problem import Problem
from torch import Tensor

FP32_LIMIT = 1e-5
ALLOWED_OVER_PLAIN_TORCH = 2.0

#: Output ("y") and gradients ("x" and the leaves' names), each as one tensor.
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """The tensor that comes closest to its limit, or passes it furthest."""

    tensor: str
    error: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit


def evaluate(forward: Callable[[Tensor, Leaves], Tensor], x: Tensor, leaves: Leaves, cotangent: Tensor) -> Values:
    """Output and gradients. A leaf that takes no part in the result has a gradient of zero."""
    output = forward(x, leaves)
    inputs = [x, *(tensor for tensors in leaves.values() for tensor in tensors)]
    found = torch.autograd.grad(output, inputs, cotangent.to(output.dtype), allow_unused=True)
    gradients = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(inputs, found, strict=True)
    ]
    values, place = {"y": output.detach(), "x": gradients[0]}, 1
    for name, tensors in leaves.items():
        values[name] = torch.cat([gradient.flatten() for gradient in gradients[place : place + len(tensors)]])
        place += len(tensors)
    return values


def _cast(leaves: Leaves, dtype: torch.dtype | None) -> Leaves:
    return {
        name: [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
        for name, tensors in leaves.items()
    }


def _definition(candidate: Candidate, problem: Problem, dtype: torch.dtype | None) -> Values:
    """The definition in ``dtype``, or with every tensor in its own."""
    x = problem.x.detach().to(dtype or problem.dtype).requires_grad_()
    weight = problem.base.weight.to(x.dtype)
    leaves = _cast(candidate.leaves, dtype)
    return evaluate(lambda x, leaves: candidate.definition(x, weight, leaves), x, leaves, problem.cotangent)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Infinite where ``found`` is not finite, or not zero where it should be."""
    difference = (found.double() - exact.double()).norm().item()
    if not math.isfinite(difference):
        return math.inf
    size = exact.double().norm().item()
    return difference / size if size else (math.inf if difference else 0.0)


class Oracle:
    """Exact values and limits of one problem, computed once for each family of candidates."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[str, tuple[Values, Mapping[str, float]]] = {}

    def _facts(self, candidate: Candidate) -> tuple[Values, Mapping[str, float]]:
        if candidate.family not in self._known:
            exact = _definition(candidate, self.problem, torch.float64)
            if self.problem.dtype == torch.float32:
                limits = dict.fromkeys(exact, FP32_LIMIT)
            else:
                plain = _definition(candidate, self.problem, None)
                limits = {
                    name: ALLOWED_OVER_PLAIN_TORCH * relative_error(plain[name], value) for name, value in exact.items()
                }
            self._known[candidate.family] = exact, limits
        return self._known[candidate.family]

    def judge(self, candidate: Candidate, gradients: bool) -> Verdict:
        """The candidate's output, and with ``gradients`` those too, against the definition."""
        exact, limits = self._facts(candidate)
        problem = self.problem
        if gradients:
            found = evaluate(lambda x, _: candidate.forward(x), problem.x, candidate.leaves, problem.cotangent)
        else:
            with torch.no_grad():
                found = {"y": candidate.forward(problem.x)}
        verdicts = [Verdict(name, relative_error(value, exact[name]), limits[name]) for name, value in found.items()]
        return max(verdicts, key=lambda verdict: verdict.error / verdict.limit if verdict.limit else verdict.error)
