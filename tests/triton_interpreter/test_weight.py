"""Weight generation, merging and their gradients in Triton, against ``reference.py``."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from pyramid_testing import (
    Case,
    Problem,
    Recorder,
    assert_all_match,
    assert_matches,
    assert_same_bits,
    examples,
    from_seed,
    poisoned_memory,
    random_geometry,
    relative_error,
    shake,
)

import ept_kernels
from ept import EPTConfig, EPTLinear
from ept_kernels import PyramidGeometry, reference

OP = "pyramid_weight"

#: Widths that no scale divides, several groups.
CASE = Case(PyramidGeometry(11, 7, 3, (2, 3, 2, 5)), num_groups=2)

CASES = {
    "odd sizes": CASE,
    "the paper's pyramid": Case(PyramidGeometry(37, 26, 8, (2, 4, 6, 8)), num_groups=2),
    "odd scales": Case(PyramidGeometry(29, 23, 5, (7, 3, 5, 1))),
    "a power of two beside an odd scale": Case(PyramidGeometry(33, 18, 2, (16, 9))),
    "several tiles both ways": Case(PyramidGeometry(139, 70, 2, (3, 4))),
    "several spans of rows": Case(PyramidGeometry(9, 263, 2, (2, 3)), num_groups=2),
    "several spans of columns": Case(PyramidGeometry(263, 9, 2, (2, 3)), num_groups=2),
    "one by one": Case(PyramidGeometry(1, 1, 1, (1,))),
    "many groups": Case(PyramidGeometry(5, 4, 2, (2,)), num_groups=7),
    "a scale switched off": replace(CASE, zero_scale=True),
    "more rank than a program serves": Case(PyramidGeometry(19, 14, 9, (14, 12, 9))),
}


def compare(problem: Problem, tolerance: float = 1e-5) -> None:
    """Output and every gradient, with the memory of outputs and partial sums poisoned."""
    truth = problem.evaluate(reference, OP, dtype=torch.float64)
    with poisoned_memory():
        results = problem.evaluate(ept_kernels, OP)
    assert {value.dtype for value in results.values()} == {problem.A.dtype}
    assert_all_match(results, truth, tolerance)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_update_and_gradients(case: Case) -> None:
    compare(case.tensors(torch.float32))


@pytest.mark.parametrize("k", range(1, 17))
def test_every_scale(k: int) -> None:
    compare(Case(PyramidGeometry(2 * k + 1, k + 1, 2, (k,)), seed=k).tensors(torch.float32))


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 17, 70])
def test_every_rank(rank: int) -> None:
    """Also ranks beyond the blocks of the generation (64) and of the gradients."""
    compare(Case(PyramidGeometry(7, 6, rank, (2, 3))).tensors(torch.float32))


def small_case(rng: random.Random) -> Case:
    return Case(random_geometry(rng, largest=24), num_groups=rng.randint(1, 3), seed=rng.randrange(1000))


@given(case=from_seed(small_case))
@examples(8)
def test_any_pyramid(case: Case) -> None:
    compare(case.tensors(torch.float32))


@pytest.mark.parametrize("case", [CASES["the paper's pyramid"], CASES["odd scales"]], ids=["even", "odd"])
def test_half_error_at_most_twice_that_of_plain_torch(case: Case) -> None:
    problem = case.tensors(torch.float16)
    truth = problem.evaluate(reference, OP, dtype=torch.float64)
    ours, plain = problem.evaluate(ept_kernels, OP), problem.evaluate(reference, OP)
    for name, value in ours.items():
        assert value.dtype == torch.float16, name
        error, allowed = relative_error(value, truth[name]), 2 * relative_error(plain[name], truth[name])
        assert error <= allowed, f"{name}: error {error:.2e}, plain torch allows {allowed:.2e}"


def test_tensors_that_are_not_contiguous() -> None:
    problem = CASE.tensors(torch.float32)
    names = ("A", "B", "folded", "weight_cotangent")
    strided = {name: getattr(problem, name).mT.contiguous().mT for name in names}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    compare(replace(problem, **strided))


def test_a_gradient_that_is_expanded() -> None:
    """What ``output.sum().backward()`` passes on: one number, all strides zero."""
    problem = CASE.tensors(torch.float32)
    compare(replace(problem, weight_cotangent=torch.ones(()).expand(problem.weight_cotangent.shape)))


def test_all_scales_inactive() -> None:
    problem = CASE.tensors(torch.float32)
    compare(replace(problem, folded=torch.zeros_like(problem.folded)))


def test_no_groups() -> None:
    problem = replace(CASE, num_groups=0).tensors(torch.float32)
    with poisoned_memory():
        results = problem.evaluate(ept_kernels, OP)
    assert results["output"].shape == (0, 7, 11)
    assert results["folded"].shape == problem.folded.shape
    assert not results["A"].any() and not results["B"].any()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    from ept_kernels.triton import backend

    p, scales = CASE.tensors(torch.float32), list(CASE.geometry.scales)
    truth = p.evaluate(reference, OP, dtype=torch.float64)
    given = backend.pyramid_weight_backward(p.weight_cotangent, p.A, p.B, p.folded, scales, list(needs))
    for need, gradient, name in zip(needs, given, ("A", "B", "folded"), strict=True):
        assert (gradient is not None) == need, name
        if need:
            assert_matches(gradient, truth[name], 1e-5, name)


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_merge_adds_in_fp32_and_rounds_once(dtype: torch.dtype, layout: str) -> None:
    p = CASE.tensors(dtype, adapter_dtype=torch.float32)
    weight = {
        "contiguous": p.weight,
        "transposed": p.weight.T.contiguous().T,
        "strided": torch.stack([p.weight, -p.weight], dim=2)[..., 0],
    }[layout]
    before = weight.clone()
    update = reference.pyramid_weight(p.A.double(), p.B.double(), p.folded.double(), p.geometry)
    with poisoned_memory():
        merged = ept_kernels.pyramid_merge(weight, p.A, p.B, p.folded, p.geometry)
    assert merged.dtype == dtype
    assert_matches(merged, weight.double() + update, 1e-6 if dtype == torch.float32 else 2.0**-11)
    assert_same_bits(weight, before)


def test_merge_into_a_dtype_that_the_kernel_does_not_serve() -> None:
    """A float64 weight: the fp32 update of the kernel, added by torch in float64."""
    p = CASE.tensors(torch.float64, adapter_dtype=torch.float32)
    update = ept_kernels.pyramid_weight(p.A, p.B, p.folded, p.geometry)
    assert_same_bits(ept_kernels.pyramid_merge(p.weight, p.A, p.B, p.folded, p.geometry), p.weight + update)


def test_a_layer_merges_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = EPTConfig(r=3, kernel_sizes=(2, 3, 2, 4), num_tasks=3)
    layer = shake(EPTLinear(11, 7, config=config, dtype=torch.float16))
    layer.merge(1)
    merged = layer.weight.clone()
    layer.unmerge()
    monkeypatch.setenv("EPT_BACKEND", "torch")
    layer.merge(1)
    assert_matches(merged, layer.weight, torch.finfo(torch.float16).eps)


# --- accounting -------------------------------------------------------------------------------------------------------


def count_launches(monkeypatch: pytest.MonkeyPatch, call) -> tuple[list[str], Recorder]:
    """Names of the kernels that ``call`` would launch, and the tensors that it makes; nothing runs."""
    from ept_kernels.triton import launch

    launched = []
    monkeypatch.setattr(launch, "runner", lambda kernel, *_: launched.append(kernel.__name__))
    with Recorder() as recorder:
        call()
    return launched, recorder


def test_one_launch_for_all_groups_and_two_for_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    p = replace(CASE, num_groups=9).tensors(torch.float32)
    launched, _ = count_launches(monkeypatch, lambda: p.evaluate(ept_kernels, OP))
    assert launched == ["weight_kernel", "weight_grad_kernel", "reduce_kernel"]


def test_merging_makes_no_dense_update(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Case(PyramidGeometry(64, 60, 2, (2, 3))).tensors(torch.float16, adapter_dtype=torch.float32)
    launched, recorder = count_launches(
        monkeypatch, lambda: ept_kernels.pyramid_merge(p.weight, p.A, p.B, p.folded, p.geometry)
    )
    assert launched == ["weight_kernel"]
    large = [tensor for _, tensors in recorder.calls for tensor in tensors if tensor.numel() >= p.weight.numel()]
    assert {tensor.dtype for tensor in large} == {torch.float16}
    assert len({tensor.untyped_storage().data_ptr() for tensor in large} - {p.weight.data_ptr()}) == 1, "the result"
