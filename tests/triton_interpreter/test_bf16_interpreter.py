"""The interpreter's bfloat16: wrong as it comes, right inside ``correct_bf16``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from interpreter_bf16 import correct_bf16
from triton.runtime.errors import InterpreterError

N = 16


@triton.jit
def to_bf16(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.load(x_ptr + place).to(tl.float32).to(tl.bfloat16))


@triton.jit
def to_fp32(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.load(x_ptr + place).to(tl.float32))


@triton.jit
def to_fp16(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.load(x_ptr + place).to(tl.float16))


@triton.jit
def dot(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(x_ptr + place), tl.load(y_ptr + place)))


@triton.jit
def add(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.load(x_ptr + place) + tl.load(y_ptr + place))


@triton.jit
def multiply(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, tl.load(x_ptr + place) * tl.load(y_ptr + place))


@triton.jit
def negate(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, -tl.load(x_ptr + place))


@triton.jit
def less(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + place, (tl.load(x_ptr + place) < tl.load(y_ptr + place)).to(tl.float32))


@triton.jit
def fma(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + place), tl.load(y_ptr + place)
    tl.store(out_ptr + place, tl.fma(x, y, x))


@triton.jit
def total(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + tl.arange(0, N), tl.sum(tl.load(x_ptr + place), 1))


bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

#: kernel, dtype of its inputs, dtype of its result, torch's answer.
WRONG: dict[str, tuple[object, torch.dtype, torch.dtype, Callable]] = {
    "rounding": (to_bf16, fp32, bf16, lambda x, y: x.bfloat16()),
    "product": (multiply, bf16, bf16, lambda x, y: x * y),
    "sum of two": (add, bf16, bf16, lambda x, y: x + y),
    "negation": (negate, bf16, bf16, lambda x, y: -x),
    "comparison": (less, bf16, fp32, lambda x, y: (x < y).float()),
    "fma": (fma, bf16, bf16, lambda x, y: (x.double() * y.double() + x.double()).bfloat16()),
    "dot": (dot, bf16, fp32, lambda x, y: x.float() @ y.float()),
}
RIGHT = {
    "bf16 to fp32": (to_fp32, bf16, fp32, lambda x, y: x.float()),
    "bf16 to fp16": (to_fp16, bf16, fp16, lambda x, y: x.half()),
}


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, N, generator=generator) for _ in range(2))
    x[0, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    return x.to(dtype), y.to(dtype)


def computed(kernel, given: torch.dtype, result: torch.dtype) -> torch.Tensor:
    x, y = inputs(given)
    out = torch.full((N, N), float("nan"), dtype=result)
    kernel[(1,)](x, y, out, N=N)
    return out


def agrees(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if expected.dtype != bf16:
        return torch.allclose(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    return torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("what", [*WRONG, *RIGHT])
def test_patched_interpreter_agrees_with_torch(what: str) -> None:
    kernel, given, result, expected = {**WRONG, **RIGHT}[what]
    with correct_bf16():
        actual = computed(kernel, given, result)
    assert agrees(actual, expected(*inputs(given)))


@pytest.mark.parametrize("what", WRONG)
def test_the_patch_is_needed(what: str) -> None:
    """Fails when a new Triton computes this correctly: then its part of the patch can go."""
    kernel, given, result, expected = WRONG[what]
    try:
        actual = computed(kernel, given, result)
    except InterpreterError:  # comparison: the booleans are taken for bfloat16 bits when they are converted
        return
    assert not agrees(actual, expected(*inputs(given)))


def test_nan_stays_nan() -> None:
    x = torch.full((N, N), float("nan"))
    x.view(torch.int32)[0] = 0x7F800001  # a NaN whose upper half is that of infinity
    out = torch.empty(N, N, dtype=bf16)
    with correct_bf16():
        to_bf16[(1,)](x, x, out, N=N)
    assert out.isnan().all()


def test_what_is_not_patched_raises() -> None:
    with correct_bf16(), pytest.raises(InterpreterError, match="reduction or scan of bfloat16"):
        computed(total, bf16, bf16)
