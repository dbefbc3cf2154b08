"""What inference keeps on a GPU: interleaved factors and folded kernels, as long as no parameter has been written.

The plain torch backend stands in for a GPU's: the orchestration is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pyramid_testing import Case, Problem, assert_matches

import ept_kernels
from ept_kernels import Kept, PyramidGeometry, reference, torch_backend, versioned_fold_cache
from ept_kernels.kept import Stamp

GEOMETRY = PyramidGeometry(11, 7, 3, (2, 3, 2, 5))
ONE = Case(GEOMETRY, lead=(3, 2))
MIXED = replace(ONE, grouping="sample", num_groups=4)


class Counted:
    """The small kernels of ``torch_backend``, counting calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable:
        self.calls.append(name)
        return getattr(torch_backend, name)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setenv("EPT_BACKEND", "torch")
    monkeypatch.setattr(torch_backend._ops, "kernels", counted)
    return counted


def output(p: Problem, kept: Kept) -> torch.Tensor:
    rows = p.x.reshape(-1, GEOMETRY.in_features)
    arguments = (rows, p.weight, p.bias, p.A, p.B, p.folded, p.groups, list(GEOMETRY.scales))
    with torch.no_grad():
        return torch_backend.pyramid_linear(*arguments, kept=kept).y


def expected(p: Problem) -> torch.Tensor:
    return p.call(reference, "pyramid_linear").reshape(-1, GEOMETRY.out_features)


@pytest.mark.parametrize(("case", "again"), [(ONE, []), (MIXED, ["core"])], ids=["one task", "mixed tasks"])
def test_later_calls_do_only_what_rows_need(case: Case, again: list[str], kernels: Counted) -> None:
    """One task: no small kernel at all, since its kernel is part of the right factor."""
    p, kept = case.tensors(), Kept()
    assert_matches(output(p, kept), expected(p), 1e-12)
    assert "interleave" in kernels.calls
    kernels.calls.clear()
    assert_matches(output(p, kept), expected(p), 1e-12)
    assert kernels.calls == again


@pytest.mark.parametrize("case", [ONE, MIXED], ids=["one task", "mixed tasks"])
@pytest.mark.parametrize("name", ["A", "B", "folded"])
@pytest.mark.parametrize("how", ["in place", "another tensor", "data replaced"])
@pytest.mark.usefixtures("kernels")
def test_a_change_is_seen(case: Case, name: str, how: str) -> None:
    p, kept = case.tensors(), Kept()
    output(p, kept)
    changed = getattr(p, name)
    if how == "in place":
        changed.mul_(2)
    elif how == "another tensor":
        p = replace(p, **{name: changed * 2})
    else:
        changed.data = changed * 2
    assert_matches(output(p, kept), expected(p), 1e-12)


@pytest.mark.usefixtures("kernels")
def test_another_dtype_is_not_served_from_what_is_kept() -> None:
    p, kept = ONE.tensors(), Kept()
    output(p, kept)
    half = replace(p, **{name: getattr(p, name).float() for name in ("x", "weight", "bias")})
    assert_matches(output(half, kept), expected(p), 1e-5)


@pytest.mark.usefixtures("kernels")
def test_nothing_is_kept_of_tensors_whose_writes_nobody_counts() -> None:
    with torch.inference_mode():
        p, kept = ONE.tensors(), Kept()
        assert_matches(output(p, kept), expected(p), 1e-12)
        assert kept.value is None
        p.A.mul_(2)
        assert_matches(output(p, kept), expected(p), 1e-12)


@pytest.mark.usefixtures("kernels")
def test_nothing_kept_is_used_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay must see parameters as they are then."""
    p, kept = ONE.tensors(), Kept()
    output(p, kept)
    monkeypatch.setattr("ept_kernels.library.captures", lambda tensor: True)
    value = kept.value
    p.A.data.mul_(2)  # not counted
    assert_matches(output(p, kept), expected(p), 1e-12)
    assert kept.value is value


# --- folded kernels ---------------------------------------------------------------------------------------------------


def fold_all(gate, table, tasks, kernels, top_k, scaling, geometry):
    """A fold that shows what it is made from."""
    total = scaling * (gate.sum() + sum(kernel.sum() for kernel in kernels)) + table.sum(1)
    active = torch.ones(len(table), len(geometry.scales), dtype=torch.bool)
    return total[:, None].expand(-1, geometry.folded_size).contiguous(), active


def parameters() -> tuple[torch.Tensor, ...]:
    kernels = [torch.randn(k, k) for k in GEOMETRY.kernel_sizes]
    return torch.randn(4, 6), *kernels, torch.randn(3, 6)


PLAN = (2, 1.5, GEOMETRY)


def test_folds_serve_until_a_parameter_is_written() -> None:
    kept, found = Kept(), parameters()
    assert versioned_fold_cache.unchanged(kept, 1, found, *PLAN) is None
    fold = versioned_fold_cache.renew(kept, Kept(), found, *PLAN, fold_all)
    assert versioned_fold_cache.unchanged(kept, 1, found, *PLAN) is fold
    assert versioned_fold_cache.unchanged(kept, 1, found, 1, 1.5, GEOMETRY) is None
    for parameter in found:
        fold = versioned_fold_cache.renew(kept, Kept(), found, *PLAN, fold_all)
        parameter.add_(1)
        assert versioned_fold_cache.unchanged(kept, 1, found, *PLAN) is None
    versioned_fold_cache.renew(kept, Kept(), found, *PLAN, fold_all)
    with pytest.raises(IndexError, match="allowed: 0 to 2"):
        versioned_fold_cache.unchanged(kept, 3, found, *PLAN)


def test_a_graph_being_captured_keeps_and_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, found = Kept(), parameters()
    versioned_fold_cache.renew(kept, Kept(), found, *PLAN, fold_all)
    monkeypatch.setattr(versioned_fold_cache, "captures", lambda tensor: True)
    assert versioned_fold_cache.unchanged(kept, 1, found, *PLAN) is None
    assert versioned_fold_cache.renew(kept, Kept(), found, *PLAN, fold_all) is None


def test_a_stamp_is_of_these_tensors_alone() -> None:
    a, b = torch.randn(3), torch.randn(3)
    stamp = Stamp.of(a, b)
    assert stamp.holds(a, b)
    assert not stamp.holds(b, a)
    assert not stamp.holds(a)
    assert not stamp.holds(a.detach(), b)
    a.zero_()
    assert not stamp.holds(a, b)


def test_gradients_never_come_from_what_is_kept(kernels: Counted) -> None:
    """Only calls without gradients get ``kept`` from the public functions."""
    p, kept = ONE.tensors(), Kept()
    leaf = p.A.clone().requires_grad_()
    arguments = (p.x, p.weight, p.bias, leaf, p.B, p.folded, p.groups, GEOMETRY)
    ept_kernels.pyramid_linear(*arguments, kept=kept).sum().backward()
    assert kept.value is None
    assert leaf.grad is not None
