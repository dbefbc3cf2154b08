"""What the tests of fused routers and folds share: random layers, and the definition in plain operations."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from pyramid_testing import assert_all_match, folded_entries, poisoned_memory
from torch import Tensor

from ept_kernels import PyramidGeometry, active_scales, fold_kernels
from ept_kernels.folding import fold_by
from ept_kernels.problem import Folder, Routing

SCALING = 4.0

#: As ``ept_kernels.fold_tasks``.
FoldTasks = Callable[..., tuple[Tensor, Tensor]]


def folds_by(folder: Folder) -> FoldTasks:
    """``fold_tasks`` by one folder, whichever backend serves."""

    def fold_tasks(gate, table, tasks, kernels, *plan) -> tuple[Tensor, Tensor]:
        return fold_by(folder, Routing(gate, table, tasks, tuple(kernels), *plan))

    return fold_tasks


class FoldCase:
    """Parameters of one layer with random sizes: gate, task embeddings and kernels, and which tasks are routed."""

    def __init__(self, seed: int, top_k: int | None = None, device: str = "cpu") -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        sizes = tuple(rng.choice((1, 2, 3, 4, 6, 8, 11)) for _ in range(rng.randint(1, 9)))
        self.geometry = PyramidGeometry(rng.randint(11, 40), rng.randint(11, 40), 2, sizes, rng.random() < 0.5)
        self.top_k = top_k or rng.randint(1, len(sizes))
        dim, tasks = rng.choice((1, 7, 16, 50)), rng.randint(1, 6)
        parameters = (torch.randn(len(sizes), dim), torch.randn(tasks, dim), *(torch.randn(k, k) for k in sizes))
        self.parameters = tuple(parameter.to(device) for parameter in parameters)
        self.tasks = rng.choice((rng.randrange(tasks), torch.randint(tasks, (rng.randint(0, 9),)).to(device), None))
        rows = len(self.tasks) if isinstance(self.tasks, Tensor) else tasks if self.tasks is None else 1
        self.cotangent = torch.randn(rows, self.geometry.folded_size).to(device)

    def fold(self, fold_tasks: FoldTasks, parameters: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        gate, table, *kernels = self.parameters if parameters is None else parameters
        return fold_tasks(gate, table, self.tasks, kernels, self.top_k, SCALING, self.geometry)

    def results(self, fold_tasks: FoldTasks, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Folded kernels, active scales and the gradient of every parameter."""
        leaves = [p.to(dtype).detach().requires_grad_() for p in self.parameters]
        folded, active = self.fold(fold_tasks, leaves)
        gradients = torch.autograd.grad(folded, leaves, self.cotangent.to(dtype), materialize_grads=True)
        names = ("gate", "table", *(f"kernel {e}" for e in range(len(leaves) - 2)))
        return {"folded": folded.detach(), "active": active, **dict(zip(names, gradients, strict=True))}


class LargeFoldCase(FoldCase):
    """Sizes beyond one tile of a fused kernel: channels, entries, experts."""

    def __init__(self, top_k: int, device: str = "cpu") -> None:
        torch.manual_seed(top_k)
        sizes = (6, 7, 8) * 11
        self.geometry, self.top_k = PyramidGeometry(40, 40, 2, sizes), top_k
        parameters = (torch.randn(33, 150), torch.randn(3, 150), *(torch.randn(k, k) for k in sizes))
        self.parameters = tuple(parameter.to(device) for parameter in parameters)
        self.tasks = torch.tensor([2, 0, 0], device=device)
        self.cotangent = torch.randn(3, self.geometry.folded_size).to(device)


class ManyGroupsFoldCase(FoldCase):
    """More groups than a block of the sums over them."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(5, device=device)
        self.tasks = torch.arange(18, device=device) % len(self.parameters[1])
        self.cotangent = torch.randn(18, self.geometry.folded_size).to(device)


class SaturatedFoldCase(FoldCase):
    """One gate rounds to 1 in fp32: the others, and what pulls at them, must not round to 0."""

    def __init__(self, top_k: int, device: str = "cpu") -> None:
        torch.manual_seed(top_k)
        self.geometry, self.top_k, self.tasks = PyramidGeometry(16, 16, 2, (2, 2, 2)), top_k, 0
        gate = torch.tensor([[20.0, -1.0], [2.0, 1.0], [1.0, 0.5]], device=device)
        table = torch.tensor([[1.0, 0.0]], device=device)
        self.parameters = (gate, table, *(torch.randn(2, 2).to(device) for _ in range(3)))
        self.cotangent = torch.randn(1, 4).to(device)


def by_definition(
    gate: Tensor,
    table: Tensor,
    tasks: int | Tensor | None,
    kernels: Sequence[Tensor],
    top_k: int,
    scaling: float,
    geometry: PyramidGeometry,
) -> tuple[Tensor, Tensor]:
    rows = table if tasks is None else table[[tasks]] if isinstance(tasks, int) else table[tasks]
    logits = rows @ gate.T
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(top_k).indices, True)
    gates = logits.masked_fill(~chosen, -torch.inf).softmax(1)
    if top_k == 1:
        full = logits.softmax(1).masked_fill(~chosen, 0)
        gates = gates.detach() + full - full.detach()
    return fold_kernels(kernels, gates, scaling, geometry), active_scales(chosen, geometry)


def assert_matches_definition(case: FoldCase, fold_tasks: FoldTasks) -> None:
    """Values and gradients from poisoned memory, against float64."""
    exact = case.results(by_definition, torch.float64)
    with poisoned_memory():
        results = case.results(fold_tasks)
    assert torch.equal(results.pop("active"), exact.pop("active"))
    assert_all_match(results, exact, 1e-5)


def assert_only_what_is_asked_for(case: FoldCase, fold_tasks: FoldTasks, wanted: int) -> None:
    """With one trained parameter, its gradient is as ever and there is no other."""
    leaves = [p.clone().requires_grad_(i == wanted) for i, p in enumerate(case.parameters)]
    case.fold(fold_tasks, leaves)[0].backward(case.cotangent)
    full = list(case.results(fold_tasks).values())[2:]
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) if i != wanted else torch.equal(leaf.grad, full[i])


def assert_ties_go_to_the_first(fold_tasks: FoldTasks, device: str = "cpu") -> None:
    geometry = PyramidGeometry(16, 16, 2, (2, 4, 4))
    kernels = [torch.ones(k, k, device=device) for k in geometry.kernel_sizes]
    ones = torch.ones(3, 5, device=device)
    folded, active = fold_tasks(ones, ones[:1], 0, kernels, 2, 1.0, geometry)
    assert active.tolist() == [[True, True]]
    assert torch.equal(folded.cpu(), torch.cat([torch.full((1, 4), 0.5), torch.full((1, 16), 0.25)], dim=1))


def assert_nan_shows(case: FoldCase, fold_tasks: FoldTasks) -> None:
    """A NaN in an expert's gate reaches the folded kernel of every task."""
    gate, *others = case.parameters
    gate = gate.clone()
    gate[0] = torch.nan
    with torch.no_grad():
        folded, active = case.fold(fold_tasks, (gate, *others))
    assert torch.equal(folded.isnan(), folded_entries(active, case.geometry)), "and no scale that it does not use"


def assert_unselected_experts_are_not_read(fold_tasks: FoldTasks, device: str = "cpu") -> None:
    """Not even NaN in its kernel, or in the gradients of tasks that do not use it, reaches anything."""
    geometry = PyramidGeometry(16, 16, 2, (2, 2))
    gate, table = (torch.tensor([[1.0], [-1.0]], device=device) for _ in range(2))
    kernels = [torch.full((2, 2), value, device=device).requires_grad_() for value in (1.0, torch.nan)]
    folded, _ = fold_tasks(gate, table, None, kernels, 1, 1.0, geometry)
    assert torch.equal(folded[0].cpu(), torch.ones(4))
    grads = torch.autograd.grad(folded, kernels, torch.tensor([[2.0], [torch.nan]], device=device).expand(2, 4))
    assert torch.equal(grads[0].cpu(), torch.full((2, 2), 2.0))
    assert grads[1].isnan().all()


def assert_unknown_tasks_show(task: int, fold_tasks: FoldTasks, device: str = "cpu") -> None:
    """Refused where it is an int; a tensor gives NaN, since its values are not read here."""
    geometry = PyramidGeometry(16, 16, 2, (2,))
    gate, table = (torch.ones(n, 5, device=device).requires_grad_() for n in (1, 3))
    kernels = [torch.ones(2, 2, device=device)]
    with pytest.raises(IndexError, match=rf"task_ids holds {task}; allowed: 0 to 2"):
        fold_tasks(gate, table, task, kernels, 1, 1.0, geometry)
    folded, _ = fold_tasks(gate, table, torch.tensor([0, task], device=device), kernels, 1, 1.0, geometry)
    assert folded.isnan().any(1).tolist() == [False, True]
    folded.sum().backward()
    assert gate.grad.isnan().all()
    assert table.grad.isfinite().all()
