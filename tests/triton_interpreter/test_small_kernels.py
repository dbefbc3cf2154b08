"""Each small kernel alone against plain torch, every access to memory checked."""

from __future__ import annotations

import dataclasses
import itertools
import mmap

import pytest
import torch
from interpreter_bf16 import correct_bf16
from interpreter_trace import traced
from small_kernels_testing import (
    CORES,
    DROPOUTS,
    FACTORS,
    FUSED,
    SMALL_TILE,
    SPANS,
    Core,
    CoreTensors,
    Fused,
    check_core,
    check_dropout,
    check_fused,
    check_gather,
    check_interleave,
    check_needs,
)
from triton.runtime.interpreter import interpreter_builder

from ept_kernels.triton import backend, core, fused
from ept_kernels.triton.dropout import dropout
from ept_kernels.triton.fused import candidates
from ept_kernels.triton.interleave import interleave


@pytest.mark.parametrize("name", FACTORS)
def test_interleave_and_gather(name: str) -> None:
    with traced() as trace:
        check_interleave(backend, FACTORS[name])
        check_gather(backend, FACTORS[name])
    trace.assert_written_once()


@pytest.mark.parametrize("name", CORES)
def test_core(name: str) -> None:
    with traced() as trace, correct_bf16():
        check_core(backend, CORES[name])
    trace.assert_written_once()


@pytest.mark.parametrize("k", [*range(1, 17), 23])
def test_core_of_every_scale(k: int) -> None:
    with traced():
        check_core(backend, Core(rows=3, rank=1, scales=(k,)))


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(("span", "most", "expected"), [(16, 4096, None), (1, 6, 6)])
def test_sums_over_several_spans(
    name: str, span: int, most: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans of few rows, the last one short; and fewer spans than rows ask for."""
    case = SPANS[name]
    monkeypatch.setattr(core, "_SPAN", span)
    monkeypatch.setattr(core, "_MOST_SUMS", most)
    with traced() as trace:
        check_core(backend, case)
    spans = trace.launches[-1].tensors["sums_ptr"].tensor.shape[1]
    assert spans == (expected or -(-case.rows // span)) // (1 if expected is None else case.num_groups)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_core_computes_what_is_asked_for(needs: tuple[bool, bool, bool]) -> None:
    case = Core(rows=9, runs=3, num_groups=2)
    with traced() as trace:
        check_needs(backend, case, needs)
    assert trace.kernels == ["core_kernel"] * any(needs[:2]) + ["kernel_grad_kernel"] * needs[2]
    stored = {name for launched in trace.launches for name in launched.stored}
    wanted = zip(("v_ptr", "du_ptr", "sums_ptr"), needs, strict=True)
    assert stored == {name for name, need in wanted if need}


def test_tables_that_are_not_contiguous() -> None:
    case = CORES["inactive, one id a row"]
    tensors = CoreTensors(case)
    folded, groups, active, scales = tensors.arguments("cpu")
    turned = (torch.stack([groups, groups], 1)[:, 0], active.T.contiguous().T)
    assert not any(table.is_contiguous() for table in turned)
    torch.testing.assert_close(
        backend.core(tensors.U, folded, *turned, scales),
        backend.core(tensors.U, folded, groups, active, scales),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name: str) -> None:
    with traced(), correct_bf16():
        check_dropout(backend, DROPOUTS[name])


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "candidates", lambda rows: [SMALL_TILE])
    with traced(), correct_bf16():
        check_fused(fused, FUSED[name])


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65])
def test_fused_with_the_tiles_that_are_shipped(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of every family of GPUs gives the same values."""
    for family in ("safe", "wide", "cdna"):
        monkeypatch.setattr(fused, "family", lambda family=family: family)
        for config in candidates(rows):
            monkeypatch.setattr(fused, "candidates", lambda rows, config=config: [config])
            check_fused(fused, Fused(rows, 70, 90, 66))


# --- offsets beyond 32 bits -------------------------------------------------------------------------------------------


def far_apart(tensor: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
    """A copy with other strides, in memory whose pages take no room unless they are written to."""
    spans = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, tensor.element_size() * (spans + 1), flags=flags)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (1, 2**29)], ids=["rows", "columns"])
def test_offsets_beyond_int32(strides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter checks that no sum or product of 32 bits overflows."""
    monkeypatch.setattr(interpreter_builder, "options", dataclasses.replace(interpreter_builder.options, debug=True))
    x, seed = torch.randn(3, 6), torch.tensor([5])
    assert torch.equal(dropout(far_apart(x, strides), seed, 0.3), dropout(x, seed, 0.3))
    x, weight, V, hat = (torch.randn(shape).half() for shape in ((3, 70), (3, 70), (3, 4), (4, 3)))
    of_weight = (2**31 + 8, 1) if strides[1] == 1 else (1, 2**25 - 8)
    turned = far_apart(x, (2**31 + 8, 1)), far_apart(weight, of_weight)
    assert torch.equal(fused.fused(*turned, None, V, hat), fused.fused(x, weight, None, V, hat))
    A, B = torch.randn(3, 6), torch.randn(6, 3)
    turned = far_apart(A, strides), far_apart(B.T, strides).T
    for actual, expected in zip(
        *(interleave(*f, 12, 12, (2, 3), torch.float32) for f in (turned, (A, B))), strict=True
    ):
        assert torch.equal(actual, expected)
