"""The fused router and fold in the interpreter against plain float64 operations: values, gradients, launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fold_testing import (
    FoldCase,
    LargeFoldCase,
    ManyGroupsFoldCase,
    SaturatedFoldCase,
    assert_matches_definition,
    assert_nan_shows,
    assert_only_what_is_asked_for,
    assert_ties_go_to_the_first,
    assert_unknown_tasks_show,
    assert_unselected_experts_are_not_read,
)
from interpreter_trace import traced
from pyramid_testing import Recorder, assert_same_bits, poisoned_memory

import ept.pyramid.adapter
from ept import EPTConfig, EPTLinear
from ept_kernels import PyramidGeometry, fold_tasks, folding, functional, ops
from ept_kernels.triton import launch
from ept_kernels.triton.fold import most_experts

SEEDS = (*range(14), 16, 17)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_it_matches_the_definition(seed: int) -> None:
    with traced():
        assert_matches_definition(FoldCase(seed), fold_tasks)


@pytest.mark.parametrize("seed", range(4))
def test_one_expert_passes_its_gradient_straight_through(seed: int) -> None:
    with traced():
        assert_matches_definition(FoldCase(seed, top_k=1), fold_tasks)


def test_the_cases_cover_what_they_should() -> None:
    cases = [FoldCase(seed) for seed in SEEDS]
    kinds = {type(case.tasks) for case in cases}
    assert kinds == {int, torch.Tensor, type(None)}
    assert any(isinstance(case.tasks, torch.Tensor) and not len(case.tasks) for case in cases), "no task at all"
    assert {1, 9} <= {case.geometry.num_experts for case in cases}
    assert any(list(case.geometry.kernel_sizes) != sorted(case.geometry.kernel_sizes) for case in cases)


@pytest.mark.parametrize("top_k", [1, 3])
def test_sizes_beyond_one_tile(top_k: int) -> None:
    assert_matches_definition(LargeFoldCase(top_k), fold_tasks)


def test_groups_beyond_one_block() -> None:
    with traced():
        assert_matches_definition(ManyGroupsFoldCase(), fold_tasks)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_saturated_router_keeps_its_gradient(top_k: int) -> None:
    assert_matches_definition(SaturatedFoldCase(top_k), fold_tasks)


def test_without_gradients_the_values_are_the_same() -> None:
    case = FoldCase(3)
    with torch.no_grad(), poisoned_memory():
        folded, active = case.fold(fold_tasks)
    expected = case.results(fold_tasks)
    assert_same_bits(folded, expected["folded"])
    assert_same_bits(active, expected["active"])
    assert not folded.requires_grad


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["gate", "table", "kernel"])
def test_only_the_gradients_asked_for(wanted: int) -> None:
    assert_only_what_is_asked_for(FoldCase(5), fold_tasks, wanted)


def test_repeats_are_equal_to_the_bit() -> None:
    first, second = (ManyGroupsFoldCase().results(fold_tasks) for _ in range(2))
    for name, value in first.items():
        assert_same_bits(value, second[name], name)


def test_a_gradient_that_is_no_contiguous_tensor() -> None:
    case = FoldCase(5)
    leaves = [p.clone().requires_grad_() for p in case.parameters]
    folded, _ = case.fold(fold_tasks, leaves)
    gradients = torch.autograd.grad(folded.sum(), leaves)  # expanded from one number
    case.cotangent = torch.ones_like(case.cotangent)
    for gradient, expected in zip(gradients, list(case.results(fold_tasks).values())[2:], strict=True):
        assert_same_bits(gradient, expected)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_first_expert() -> None:
    assert_ties_go_to_the_first(fold_tasks)


@pytest.mark.parametrize("top_k", [1, 3])
def test_nan_shows(top_k: int) -> None:
    assert_nan_shows(FoldCase(7, top_k), fold_tasks)


def test_an_expert_that_is_not_selected_is_not_read() -> None:
    assert_unselected_experts_are_not_read(fold_tasks)


@pytest.mark.parametrize("task", [-1, 3])
def test_a_task_that_the_table_lacks(task: int) -> None:
    with traced():
        assert_unknown_tasks_show(task, fold_tasks)


def test_a_second_derivative_is_refused() -> None:
    case = FoldCase(5)
    leaves = [p.clone().requires_grad_() for p in case.parameters]
    folded, _ = case.fold(fold_tasks, leaves)
    (gradient,) = torch.autograd.grad(folded.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


# --- who is asked -----------------------------------------------------------------------------------------------------


def test_the_chooser_takes_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the number of experts that fit a program; not where another backend is forced or a mode watches."""
    case = FoldCase(3)
    assert case.fold(fold_tasks) is not None
    for experts in (most_experts, most_experts + 1):
        geometry = PyramidGeometry(4, 4, 1, (1,) * experts)
        kernels, gate = [torch.ones(1, 1)] * experts, torch.ones(experts, 2)
        answer = fold_tasks(gate, torch.ones(1, 2), 0, kernels, 1, 1.0, geometry)
        assert (answer is None) == (experts > most_experts)
    with Recorder():
        assert case.fold(fold_tasks) is None
    monkeypatch.setenv("EPT_BACKEND", "torch")
    assert case.fold(fold_tasks) is None


# --- launches ---------------------------------------------------------------------------------------------------------

#: Operations that only describe memory or take it.
FREE = {"view", "reshape", "detach", "empty", "empty_like", "new_empty", "as_strided", "alias", "slice", "split", "t"}
#: A ``to`` is one of a tensor that has the dtype already: everything here is fp32.
FREE |= {
    "select",
    "to",
    "expand",
    "_unsafe_view",
    "narrow",
    "unsqueeze",
    "split_with_sizes",
    "numpy_T",
    "promote_types",
    "permute",
}


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """What a call would launch on a GPU, by name, as eager code: the counter does not count as a watcher."""
    for module in (folding, functional, ops):
        monkeypatch.setattr(module, "is_eager", lambda *tensors: True)

    def count(call: Callable[[], object]) -> list[str]:
        launched = []
        with monkeypatch.context() as patch, Recorder() as recorder:
            patch.setattr(launch, "runner", lambda kernel, *_: launched.append(kernel.__name__))
            call()
        return launched + [name for name in recorder.names() if name not in FREE]

    return count


@pytest.mark.parametrize("tasks", [1, torch.tensor([0, 1, 1]), None], ids=["int", "tensor", "all"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_two_launches_each_way(top_k: int, tasks: object, launches_of) -> None:
    case = FoldCase(3, top_k)
    case.tasks = tasks
    leaves = [p.clone().requires_grad_() for p in case.parameters]
    case.fold(fold_tasks, leaves)  # the first call for a geometry makes its tables
    outputs = []
    assert launches_of(lambda: outputs.append(case.fold(fold_tasks, leaves)[0])) == ["fold_kernel", "cat"]
    cotangent = torch.ones_like(outputs[0])
    backward = launches_of(lambda: torch.autograd.grad(outputs[0], leaves, cotangent))
    assert backward == ["logits_grad_kernel", "fold_grad_kernel"]
    only_kernels = [*case.parameters[:2], *leaves[2:]]
    folded, _ = case.fold(fold_tasks, only_kernels)
    assert launches_of(lambda: torch.autograd.grad(folded, leaves[2:], cotangent)) == ["fold_grad_kernel"]


#: Of a layer beside the fold: the small kernels and torch's products; for ids in a tensor their check, which a model
#: makes once for all its layers, and the groups.
FORWARD = ["addmm", "addmm_", "cat", "core_kernel", "fold_kernel", "interleave_kernel", "mm"]
BACKWARD = ["core_kernel", "fold_grad_kernel", "gather_kernel", "kernel_grad_kernel", "logits_grad_kernel"] + ["mm"] * 3
IDS = ["_assert_async", "all", "arange", "bitwise_and", "ge", "lt"]


@pytest.mark.parametrize(("task", "ids"), [(1, []), (torch.tensor([0, 2, 1]), IDS)], ids=["int", "tensor"])
def test_an_eager_layer(task: object, ids: list[str], launches_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a layer with the default pyramid: all that is left of what the composition launches."""
    layer = EPTLinear(64, 48, config=EPTConfig(num_tasks=3, top_k=2))
    x = torch.randn(3, 5, 64)
    layer(x, task)

    def step() -> tuple[list[str], list[str]]:
        outputs = []
        forward = launches_of(lambda: outputs.append(layer(x, task)))
        cotangent = torch.ones_like(outputs[0])
        trained = [p for p in layer.parameters() if p.requires_grad]
        return forward, launches_of(lambda: torch.autograd.grad(outputs[0], trained, cotangent))

    forward, backward = step()
    assert sorted(forward) == sorted(FORWARD + ids)
    assert sorted(backward) == BACKWARD
    for name in ("fold_tasks", "routed_linear"):
        monkeypatch.setattr(ept.pyramid.adapter, name, lambda *_: None)
    composed_forward, composed_backward = step()
    print(f"composed: {len(composed_forward)} forward, {len(composed_backward)} backward")
    assert len(composed_forward) - len(forward) >= 18
    assert len(composed_backward) - len(backward) >= 18


def test_batched_gradients_are_refused_by_name() -> None:
    case = FoldCase(3)
    leaves = [p.clone().requires_grad_() for p in case.parameters]
    folded, _ = case.fold(fold_tasks, leaves)
    with pytest.raises(RuntimeError, match="cannot be batched"):
        torch.autograd.grad(folded, leaves[0], torch.stack([case.cotangent] * 2), is_grads_batched=True)
