"""The static sizes of a layer: derivation, validation, and the specification's check values."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyramid_testing import examples

from ept_kernels import PyramidGeometry
from ept_kernels.geometry import check_kernel_sizes

DEFAULT_PYRAMID = (2, 2, 4, 4, 6, 6, 8, 8)


def test_sizes_of_a_square_layer() -> None:
    g = PyramidGeometry(768, 768, 8, DEFAULT_PYRAMID)
    assert g.scales == (2, 4, 6, 8)
    assert g.widths == g.heights == (384, 192, 128, 96)
    assert g.alp_factors == (1.0, 1 / 2, 1 / 3, 1 / 4)
    assert g.offsets == (0, 4, 20, 56)
    assert g.folded_size == 120
    assert g.columns == (0, 16, 48, 96)
    assert g.shrink_size == 160
    assert (g.seed_width, g.seed_height) == (384, 384)
    assert g.num_experts == 8
    assert g.expert_scale == (0, 0, 1, 1, 2, 2, 3, 3)


def test_sizes_where_no_scale_divides() -> None:
    g = PyramidGeometry(10, 7, 3, (4, 3, 4, 5))
    assert g.kernel_sizes == (4, 3, 4, 5), "experts keep their order"
    assert g.scales == (3, 4, 5)
    assert g.widths == (4, 3, 2)
    assert g.heights == (3, 2, 2)
    assert g.alp_factors == (1.0, 2 / 3, 2 / 3), "the share of the seed's rows, from the output side"
    assert g.offsets == (0, 9, 25)
    assert g.folded_size == 50
    assert g.columns == (0, 9, 21)
    assert g.shrink_size == 36
    assert (g.seed_width, g.seed_height) == (4, 3)
    assert g.expert_scale == (1, 0, 1, 2)


def test_without_alp_scaling_every_factor_is_one() -> None:
    assert PyramidGeometry(64, 64, 2, (2, 8), alp_scaling=False).alp_factors == (1.0, 1.0)


@given(
    st.integers(1, 100), st.integers(1, 100), st.integers(1, 16), st.lists(st.integers(1, 9), min_size=1, max_size=8)
)
@examples(60)
def test_sizes_cover_the_layer_exactly(in_features: int, out_features: int, rank: int, sizes: list[int]) -> None:
    sizes = [min(k, in_features, out_features) for k in sizes]
    g = PyramidGeometry(in_features, out_features, rank, tuple(sizes))
    assert set(g.scales) == set(sizes)
    for k, width, height, factor in zip(g.scales, g.widths, g.heights, g.alp_factors, strict=True):
        assert width == math.ceil(in_features / k)
        assert height == math.ceil(out_features / k)
        assert factor == height / math.ceil(out_features / min(sizes))
        assert 0 < factor <= 1
    assert list(g.kernel_sizes) == [g.scales[scale] for scale in g.expert_scale]
    assert g.num_parameters == rank * (max(g.widths) + max(g.heights)) + sum(k * k for k in sizes)


def test_parameter_count_of_the_paper() -> None:
    """Specification, section 1: 6144 in the seed and 240 in the kernels, against 98,304 of eight LoRA experts."""
    in_features = out_features = 768
    rank = 8
    g = PyramidGeometry(in_features, out_features, rank, DEFAULT_PYRAMID)
    seed = rank * (in_features // 2) + (out_features // 2) * rank  # A and B at k_min = 2
    kernels = sum(k * k for k in DEFAULT_PYRAMID)
    assert (seed, kernels) == (6144, 240)
    assert g.num_parameters == seed + kernels == 6384
    eight_lora_experts = 8 * rank * (in_features + out_features)  # A [r, in] and B [out, r] each
    assert eight_lora_experts == 98_304


def test_frozen_and_hashable_with_equality_by_arguments() -> None:
    g = PyramidGeometry(8, 8, 2, [2, 4])
    assert g == PyramidGeometry(8, 8, 2, (2, 4))
    assert hash(g) == hash(PyramidGeometry(8, 8, 2, (2, 4)))
    assert g != PyramidGeometry(8, 8, 2, (2, 4), alp_scaling=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        g.rank = 3


@pytest.mark.parametrize("argument", ["in_features", "out_features", "rank"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", None, True])
def test_bad_size_is_named(argument: str, value: object) -> None:
    arguments = {"in_features": 8, "out_features": 8, "rank": 2, "kernel_sizes": (2,), argument: value}
    with pytest.raises(ValueError, match=rf"{argument} must be an integer >= 1, got {value!r}"):
        PyramidGeometry(**arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "kernel_sizes must name at least one expert"),
        (4, "kernel_sizes must be a sequence of integers >= 1, got 4"),
        (None, "kernel_sizes must be a sequence of integers >= 1, got None"),
        ((2, 0), "kernel_sizes must be an integer >= 1, got 0"),
        ((2, -4), "kernel_sizes must be an integer >= 1, got -4"),
        ((2.0,), "kernel_sizes must be an integer >= 1, got 2.0"),
        ((True,), "kernel_sizes must be an integer >= 1, got True"),
        ("24", "kernel_sizes must be an integer >= 1, got '2'"),
    ],
)
def test_bad_kernel_sizes_are_named(sizes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernel_sizes(sizes)
    with pytest.raises(ValueError, match=message):
        PyramidGeometry(8, 8, 2, sizes)


@pytest.mark.parametrize(("in_features", "out_features"), [(7, 20), (20, 7)])
def test_scale_larger_than_the_layer_is_named(in_features: int, out_features: int) -> None:
    PyramidGeometry(in_features, out_features, 2, (7,))
    with pytest.raises(
        ValueError, match=rf"scale 8.*in_features={in_features}, out_features={out_features}.*allowed: 1 to 7"
    ):
        PyramidGeometry(in_features, out_features, 2, (2, 8))
