"""Merging one task into the weight, refusing what cannot be right, and taking it out to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from pyramid_testing import assert_matches, assert_same_bits, shake
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ept import EPTConfig, EPTLinear, use_tasks
from ept.adapted_linear import merged_weight

NAMES = ["cola", "mrpc", "rte"]


def make_layer(dtype: torch.dtype = torch.float32, bias: bool = True, **changes: object) -> EPTLinear:
    torch.manual_seed(0)
    config = EPTConfig(r=3, kernel_sizes=(2, 3, 2, 4), task_names=NAMES, task_embedding_dim=6, **changes)
    return shake(EPTLinear(11, 7, bias, config=config, dtype=dtype))


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)],
)
@pytest.mark.parametrize("task", [0, 2, "mrpc"])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_output_equals_unmerged(bias: bool, task: int | str, dtype: torch.dtype, tolerance: float) -> None:
    layer = make_layer(dtype, bias)
    x = rows(4, 5, 11, dtype=dtype)
    expected = layer(x, task)
    parameter = layer.weight
    layer.merge(task)
    assert layer.merged
    assert layer.weight is parameter
    assert layer.weight.dtype == dtype
    assert not layer.weight.requires_grad
    for task_ids in (task, None, [task] * 4):
        assert_matches(layer(x, task_ids), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(dtype: torch.dtype) -> None:
    layer = make_layer(dtype)
    with torch.no_grad():
        layer.weight[0, 0] = -0.0
    x, before = rows(3, 11, dtype=dtype), layer.weight.detach().clone()
    expected = layer(x, 1)
    pointer = layer.weight.data_ptr()
    for task in (0, 1, 2):
        layer.merge(task)
        assert not torch.equal(layer.weight, before)
        layer.unmerge()
        assert not layer.merged
        assert_same_bits(layer.weight, before)
    assert layer.weight.data_ptr() == pointer
    assert_same_bits(layer(x, 1), expected)


def test_the_sum_is_rounded_once() -> None:
    """A half weight: added in the adapter's fp32."""
    layer = make_layer(torch.bfloat16)
    expected = (layer.weight.float() + layer.delta_weight(1)).bfloat16()
    layer.merge(1)
    assert_same_bits(layer.weight, expected)


def test_unmerge_without_merge_does_nothing() -> None:
    layer = make_layer()
    before = layer.weight.detach().clone()
    layer.unmerge()
    assert_same_bits(layer.weight, before)
    assert not layer.merged


def test_merge_twice_is_refused() -> None:
    layer = make_layer()
    layer.merge(1)
    merged = layer.weight.detach().clone()
    for task in (1, 2):
        with pytest.raises(ValueError, match="task 1 is already merged into the weight; unmerge it first"):
            layer.merge(task)
    assert_same_bits(layer.weight, merged)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (None, ValueError, "task_ids is missing"),
        (3, ValueError, "task_ids holds 3"),
        ("qqp", ValueError, "unknown task 'qqp'"),
        (torch.tensor([0, 1]), TypeError, "task must be one id or name"),
        ([0, 1], TypeError, "task must be one id or name"),
        (1.0, TypeError, "task_ids must be"),
    ],
)
def test_a_bad_task_is_refused_with_nothing_changed(task: object, error: type[Exception], message: str) -> None:
    layer = make_layer()
    before = layer.weight.detach().clone()
    with pytest.raises(error, match=message):
        layer.merge(task)
    assert_same_bits(layer.weight, before)
    assert not layer.merged


def test_another_task_than_the_merged_one_is_refused() -> None:
    layer = make_layer()
    x = rows(2, 11)
    layer.merge("mrpc")
    for task_ids in (0, "rte", [1, 0], torch.tensor([1, 2]), torch.tensor(0)):
        with pytest.raises(ValueError, match="task_ids must be 1, the task that is merged into the weight"):
            layer(x, task_ids)
        with pytest.raises(ValueError, match="task_ids must be 1, the task that is merged"), use_tasks(task_ids):
            layer(x)
    with pytest.raises(ValueError, match="unknown task 'qqp'"):
        layer(x, "qqp")
    with use_tasks([1, 1]):
        assert layer(x).shape == (2, 7)


def test_a_merged_layer_still_names_bad_input() -> None:
    layer = make_layer()
    layer.merge(1)
    with pytest.raises(ValueError, match=r"x must be \[..., in_features=11\], got \[2, 10\]"):
        layer(rows(2, 10), 1)
    with pytest.raises(ValueError, match="one id for each of the 4 samples"):
        layer(rows(4, 11), [1, 1, 1])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["A", "B", "kernels"])
def test_a_result_that_is_not_finite_is_refused_with_nothing_changed(where: str, value: float) -> None:
    layer = make_layer()
    index, _ = layer.route(1)
    with torch.no_grad():
        target = layer.kernels[int(index[0, 0])] if where == "kernels" else getattr(layer, where)
        target[0, 0] = value
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="merging task 1 gives a weight that is not finite; nothing was changed"):
        layer.merge(1)
    assert_same_bits(layer.weight, before)
    assert not layer.merged


def test_an_overflow_of_a_half_weight_is_refused() -> None:
    layer = make_layer(torch.float16)
    with torch.no_grad():
        layer.A.mul_(1e6)
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(0)
    assert layer.weight.isfinite().all()


def test_one_task_merges_without_a_name() -> None:
    layer = shake(EPTLinear(11, 7, config=EPTConfig(r=3, kernel_sizes=(2, 3), num_tasks=1)))
    x = rows(3, 11)
    expected = layer(x)
    layer.merge()
    assert_matches(layer(x), expected, 1e-5)


def test_merging_ignores_autocast_and_dropout() -> None:
    layer = make_layer(lora_dropout=0.5)
    expected = layer.weight + layer.delta_weight(2)
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge(2)
    assert_same_bits(layer.weight, expected.detach())


def test_copies_of_a_merged_layer_unmerge_by_themselves() -> None:
    layer = make_layer()
    before = layer.weight.detach().clone()
    layer.merge(1)
    other = copy.deepcopy(layer)
    other.unmerge()
    assert_same_bits(other.weight, before)
    assert layer.merged
    layer.unmerge()
    assert_same_bits(layer.weight, before)


def test_the_original_moves_with_the_layer_and_is_not_saved() -> None:
    layer = make_layer()
    keys, before = set(layer.state_dict()), layer.weight.detach().clone()
    layer.merge(1)
    assert set(layer.state_dict()) == keys
    layer.double()
    layer.unmerge()
    assert_same_bits(layer.weight, before.double())


def test_a_merged_layer_trains_nothing_through_its_weight() -> None:
    layer = make_layer()
    layer.merge(1)
    x = rows(3, 11).requires_grad_()
    layer(x, 1).sum().backward()
    assert_matches(x.grad, layer.weight.sum(0).expand(3, 11), 1e-6)
    assert layer.weight.grad is None


def test_a_shared_linear_sees_the_merge() -> None:
    linear = nn.Linear(11, 7)
    layer = shake(EPTLinear.from_linear(linear, EPTConfig(r=3, kernel_sizes=(2, 3), num_tasks=2)))
    x = rows(3, 11)
    before, expected = linear(x), layer(x, 1)
    layer.merge(1)
    assert_matches(linear(x), expected, 1e-5)
    layer.unmerge()
    assert_same_bits(linear(x), before)


def test_several_adapters_and_a_transposed_weight() -> None:
    """What the tuner merges: the sum of the active adapters, into GPT-2's ``[in, out]``."""
    first, second = make_layer(torch.float64), shake(make_layer(torch.float64), seed=7)
    weight = rows(11, 7, dtype=torch.float64)
    before = weight.clone()
    merged = merged_weight(weight, [first, second], 1, transposed=True)
    assert_matches(merged, weight + (first.delta_weight(1) + second.delta_weight(1)).T, 1e-14)
    assert_same_bits(weight, before)
    assert not merged.requires_grad


def _halve(layer: nn.Module) -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    parametrize.register_parametrization(layer, "weight", Half())


#: Ways in which a layer may compute its weight at every call.
COMPUTED = {
    "parametrize": _halve,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm as a hook": nn.utils.weight_norm,
    "spectral_norm as a hook": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", COMPUTED)
def test_a_weight_that_is_computed_is_not_merged_into(change: str) -> None:
    layer, x = make_layer().eval(), rows(4, 5, 11)
    COMPUTED[change](layer)
    expected = layer(x, 1).detach()
    with pytest.raises(ValueError, match=r"the layer \(.*EPTLinear\) computes its weight at every call"):
        layer.merge(1)
    assert not layer.merged
    assert_same_bits(layer(x, 1), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", COMPUTED)
def test_a_linear_whose_weight_is_computed_cannot_be_shared(change: str) -> None:
    linear = nn.Linear(11, 7)
    COMPUTED[change](linear)
    config = EPTConfig(r=3, kernel_sizes=(2, 3), num_tasks=2)
    with pytest.raises(ValueError, match=r"linear .* computes its weight or bias"):
        EPTLinear.from_linear(linear, config)
    assert all(parameter.requires_grad for parameter in linear.parameters())
