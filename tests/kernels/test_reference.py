"""The oracle itself, against formulations that share no code with it: torch.kron, explicit indices, the identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pyramid_testing import Case, alp_factor, assert_matches, cases, examples, geometries, kron_weight

from ept_kernels import PyramidGeometry, reference

TIGHT = 1e-12


def seed_and_kernels(geometry: PyramidGeometry, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    A, B = normal(geometry.rank, geometry.seed_width), normal(geometry.seed_height, geometry.rank)
    return A, B, [normal(k, k) for k in geometry.kernel_sizes]


def test_one_expert_by_explicit_indices() -> None:
    """``W[o, i] = (B A)[o // k, i // k] K[o % k, i % k]``, entry by entry, where k divides neither side."""
    g = PyramidGeometry(7, 5, 2, (2, 3))
    A, B, (_, kernel) = seed_and_kernels(g, 0)
    weight = reference.scale_weight(A, B, kernel, g)
    seed = B @ A
    for o in range(5):
        for i in range(7):
            expected = seed[o // 3, i // 3] * kernel[o % 3, i % 3]
            assert weight[o, i].item() == pytest.approx(expected.item(), abs=1e-14)


@given(geometries(), st.integers(0, 100))
@examples(40)
def test_one_expert_is_a_kronecker_product_and_a_deconvolution(geometry: PyramidGeometry, seed: int) -> None:
    A, B, kernels = seed_and_kernels(geometry, seed)
    out_features, in_features = geometry.out_features, geometry.in_features
    for kernel in kernels:
        weight = reference.scale_weight(A, B, kernel, geometry)
        assert_matches(weight, kron_weight(A, B, kernel, out_features, in_features), TIGHT)
        k = kernel.shape[0]
        pruned = (B @ A)[: -(-out_features // k), : -(-in_features // k)]
        deconvolved = F.conv_transpose2d(pruned[None, None], kernel[None, None], stride=k)[0, 0]
        assert_matches(weight, deconvolved[:out_features, :in_features], TIGHT)


@given(geometries(), st.integers(0, 100))
@examples(40)
def test_identity_1_no_kronecker_product_is_needed(geometry: PyramidGeometry, seed: int) -> None:
    """``W_e x = vec(B_k (A_k X) K^T)`` with x zero-padded and viewed as ``X [w_k, k]``, the result cropped."""
    A, B, kernels = seed_and_kernels(geometry, seed)
    x = torch.randn(geometry.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for kernel in kernels:
        k = kernel.shape[0]
        height, width = -(-geometry.out_features // k), -(-geometry.in_features // k)
        X = F.pad(x, (0, width * k - geometry.in_features)).view(width, k)
        y = (B[:height] @ (A[:, :width] @ X) @ kernel.T).flatten()[: geometry.out_features]
        assert_matches(reference.scale_weight(A, B, kernel, geometry) @ x, y, TIGHT)


@given(geometries(), st.integers(1, 4), st.integers(0, 100))
@examples(40)
def test_identity_2_experts_of_a_scale_fold(geometry: PyramidGeometry, groups: int, seed: int) -> None:
    """Gated sum over experts, by torch.kron = layer_update = the dense update of the folded kernels."""
    A, B, kernels = seed_and_kernels(geometry, seed)
    gates = torch.rand(groups, len(kernels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gates = gates * (gates > 0.4)  # as after top-k: some experts are not selected
    out_features, in_features = geometry.out_features, geometry.in_features
    k_min = min(geometry.kernel_sizes)
    expected = torch.zeros(groups, out_features, in_features, dtype=torch.float64)
    for g in range(groups):
        for gate, kernel in zip(gates[g], kernels, strict=True):
            factor = alp_factor(out_features, kernel.shape[0], k_min) if geometry.alp_scaling else 1.0
            expected[g] += 1.7 * gate * factor * kron_weight(A, B, kernel, out_features, in_features)
    assert_matches(reference.layer_update(A, B, kernels, gates, 1.7, geometry), expected, TIGHT)
    folded = reference.fold_kernels(kernels, gates, 1.7, geometry)
    assert_matches(reference.pyramid_weight(A, B, folded, geometry), expected, TIGHT)


@given(cases())
@examples(40)
def test_identity_5_the_adapter_is_one_dense_weight_per_group(case: Case) -> None:
    """``pyramid_delta`` and ``pyramid_linear``, row by row, from Kronecker products."""
    p = case.tensors()
    g = p.geometry
    rows = p.x.reshape(-1, g.in_features)
    delta = torch.zeros(len(rows), g.out_features, dtype=torch.float64)
    for t, row in enumerate(rows):
        group = 0 if p.groups is None else int(p.groups[t * len(p.groups) // len(rows)])
        start = 0
        for k in sorted(set(g.kernel_sizes)):
            kernel = p.folded[group, start : start + k * k].view(k, k)
            start += k * k
            delta[t] += kron_weight(p.A, p.B, kernel, g.out_features, g.in_features) @ row
    shape = (*case.lead, g.out_features)
    assert_matches(p.call(reference, "pyramid_delta"), delta.view(shape), TIGHT)
    base = rows @ p.weight.T + (0 if p.bias is None else p.bias)
    assert_matches(p.call(reference, "pyramid_linear"), (base + delta).view(shape), TIGHT)


@pytest.mark.parametrize(("k", "kernel_rank"), [(2, 1), (2, 2), (4, 3), (5, 5)])
@pytest.mark.parametrize("rank", [1, 3])
def test_identity_6_rank_of_an_expert(rank: int, k: int, kernel_rank: int) -> None:
    """``rank(W_e) = r * rank(K_e)``, up to r * k and not r."""
    g = PyramidGeometry(20 * k, 20 * k, rank, (k,))
    A, B, _ = seed_and_kernels(g, 0)
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(k, kernel_rank, generator=generator, dtype=torch.float64)
    kernel = left @ torch.randn(kernel_rank, k, generator=generator, dtype=torch.float64)
    weight = reference.scale_weight(A, B, kernel, g)
    assert torch.linalg.matrix_rank(weight).item() == rank * kernel_rank


def test_packing_round_trip() -> None:
    g = PyramidGeometry(9, 9, 2, (3, 1, 2))
    folded = torch.arange(2.0 * g.folded_size).view(2, -1)
    blocks = reference.unpack_folded(folded, g)
    assert [list(block.shape) for block in blocks] == [[2, 1, 1], [2, 2, 2], [2, 3, 3]]
    assert torch.equal(torch.cat([block.flatten(1) for block in blocks], dim=1), folded)


def test_rows_take_their_segment() -> None:
    assert reference.row_groups(6, torch.tensor([2, 0]), torch.device("cpu")).tolist() == [2, 2, 2, 0, 0, 0]
    assert reference.row_groups(3, None, torch.device("cpu")).tolist() == [0, 0, 0]
    assert reference.row_groups(0, torch.tensor([], dtype=torch.long), torch.device("cpu")).tolist() == []
