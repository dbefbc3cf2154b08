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
from ept_kernels import Kept, PyramidGeometry, folding, problem, reference
from ept_kernels.backends import torch as torch_backend
from ept_kernels.problem import Base, Folded, Routing, RoutingStamp, Stamp

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
    with torch.no_grad():
        return torch_backend.forward(p.for_backends(), Base(p.weight, p.bias), kept=kept).y


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
    monkeypatch.setattr("ept_kernels.backends.gpu.captures", lambda tensor: True)
    value = kept.value
    p.A.data.mul_(2)  # not counted
    assert_matches(output(p, kept), expected(p), 1e-12)
    assert kept.value is value


# --- folded kernels ---------------------------------------------------------------------------------------------------


class Folder:
    """A folder that keeps by versions, as those of GPUs do, and whose folds show what they are made from."""

    most_experts = 64
    mark = staticmethod(RoutingStamp.of)

    @staticmethod
    def fold(routing: Routing, save: bool) -> Folded:
        total = routing.scaling * sum(each.sum() for each in (routing.gate, *routing.kernels)) + routing.table.sum(1)
        active = torch.ones(len(routing.table), len(GEOMETRY.scales), dtype=torch.bool)
        return Folded(total[:, None].expand(-1, GEOMETRY.folded_size).contiguous(), active)


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch) -> Routing:
    monkeypatch.setenv("EPT_BACKEND", "torch")
    monkeypatch.setattr(torch_backend, "folder", Folder)
    kernels = tuple(torch.randn(k, k) for k in GEOMETRY.kernel_sizes)
    return Routing(torch.randn(4, 6), torch.randn(3, 6), 1, kernels, 2, 1.5, GEOMETRY)


def test_folds_serve_until_a_parameter_is_written(routing: Routing) -> None:
    kept = Kept()
    assert folding.find_kept(routing, kept) is None
    assert folding.keep(routing, kept, Kept())
    folded, *_ = folding.find_kept(routing, kept)
    assert torch.equal(folded, Folder.fold(routing, False).folded[1:2])
    assert folding.find_kept(routing, kept)[0] is folded
    assert folding.find_kept(routing._replace(top_k=1), kept) is None
    for parameter in routing.parameters:
        assert folding.keep(routing, kept, Kept())
        parameter.add_(1)
        assert folding.find_kept(routing, kept) is None
    assert folding.keep(routing, kept, Kept())
    with pytest.raises(IndexError, match="allowed: 0 to 2"):
        folding.find_kept(routing._replace(tasks=3), kept)


def test_a_graph_being_captured_keeps_and_reads_nothing(routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    assert folding.keep(routing, kept, Kept())
    monkeypatch.setattr(problem, "captures", lambda tensor: True)
    assert folding.find_kept(routing, kept) is None
    assert not folding.keep(routing, kept, Kept())


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
