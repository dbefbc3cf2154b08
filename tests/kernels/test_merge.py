"""``pyramid_merge`` on every backend that serves a CPU: the exact sum, rounded once; no gradient; bad input named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyramid_testing import Case, Problem, assert_matches, assert_same_bits, poisoned_memory, tight, working_dtype

import ept_kernels
from ept_kernels import PyramidGeometry, reference

CASE = Case(PyramidGeometry(11, 7, 3, (2, 3, 2, 5)), num_groups=3)


def merge(p: Problem) -> torch.Tensor:
    return ept_kernels.pyramid_merge(p.weight, p.A, p.B, p.folded, p.geometry)


def exact_sum(p: Problem) -> torch.Tensor:
    return p.weight.double() + reference.pyramid_weight(p.A.double(), p.B.double(), p.folded.double(), p.geometry)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float64, torch.float32, 1e-6),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-6),
        (torch.bfloat16, torch.float32, 2.0**-8),
        (torch.bfloat16, torch.bfloat16, 2.0**-8),
        (torch.float16, torch.float32, 2.0**-11),
        (torch.float16, torch.float64, 2.0**-11),
    ],
    ids=str,
)
def test_rounded_once_in_the_dtype_of_the_weight(
    dtype: torch.dtype, adapter_dtype: torch.dtype, tolerance: float, backend: str
) -> None:
    """Half factors too: their products are exact in fp32, so half the last place is all that rounding may cost."""
    p = CASE.tensors(dtype, adapter_dtype=adapter_dtype)
    if adapter_dtype == torch.float64 != working_dtype():
        with pytest.raises(RuntimeError, match=r"cannot serve torch\.float64"):
            merge(p)
        return
    with poisoned_memory():
        merged = merge(p)
    assert merged.dtype == dtype
    assert_matches(merged, exact_sum(p), tolerance)


@pytest.mark.usefixtures("backend")
def test_half_is_the_rounded_fp32_sum_to_the_bit() -> None:
    p = CASE.tensors(torch.bfloat16, adapter_dtype=torch.float32)
    update = ept_kernels.pyramid_weight(p.A, p.B, p.folded, p.geometry)
    assert_same_bits(merge(p), (p.weight.float() + update).bfloat16())


@pytest.mark.usefixtures("backend")
def test_any_strides_and_nothing_written() -> None:
    p = CASE.tensors()
    names = ("weight", "A", "B", "folded")
    strided = replace(p, **{name: getattr(p, name).T.contiguous().T for name in names})
    before = {name: getattr(strided, name).clone() for name in names}
    merged = merge(strided)
    assert_matches(merged, exact_sum(p), tight())
    assert merged.is_contiguous()
    for name, value in before.items():
        assert_same_bits(getattr(strided, name), value, name)
        assert merged.untyped_storage().data_ptr() != getattr(strided, name).untyped_storage().data_ptr()


@pytest.mark.usefixtures("backend")
def test_no_groups() -> None:
    assert merge(replace(CASE, num_groups=0).tensors()).shape == (0, 7, 11)


@pytest.mark.usefixtures("backend")
def test_autocast_changes_nothing() -> None:
    p = CASE.tensors(torch.float32)
    expected = merge(p)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(merge(p), expected)


@pytest.mark.parametrize("name", ["weight", "A", "B", "folded"])
def test_a_gradient_is_refused(name: str) -> None:
    p = CASE.tensors()
    p = replace(p, **{name: getattr(p, name).clone().requires_grad_()})
    with pytest.raises(RuntimeError, match="pyramid_merge has no gradient; call it under"):
        merge(p)
    with torch.no_grad():
        assert not merge(p).requires_grad
    raw = torch.ops.ept.pyramid_merge(p.weight, p.A, p.B, p.folded, list(p.geometry.scales))
    with pytest.raises(RuntimeError, match="a merged weight has no gradient"):
        raw.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(11, 7)}, r"weight must be \[out, in\] = \[7, 11\], got \[11, 7\]"),
        ({"weight": torch.zeros(7, 11, dtype=torch.int8)}, "weight must be a floating-point tensor, got torch.int8"),
        ({"A": torch.zeros(3, 5)}, r"A must be .* \[3, 6\], got \[3, 5\]"),
        ({"folded": torch.zeros(3, 37)}, r"folded must be \[groups, 38\], got \[3, 37\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(replace(CASE.tensors(), **change))


def test_opcheck_and_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_BACKEND", "torch")
    p = CASE.tensors(torch.bfloat16, adapter_dtype=torch.float32)
    arguments = (p.weight, p.A, p.B, p.folded, list(p.geometry.scales))
    torch.library.opcheck(torch.ops.ept.pyramid_merge.default, arguments)
    torch._dynamo.reset()
    assert_same_bits(torch.compile(lambda: merge(p), fullgraph=True, backend="aot_eager")(), merge(p))
