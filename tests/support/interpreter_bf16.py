"""bfloat16 in Triton's interpreter, which gets it wrong: what we replace, for tests that need it.

The interpreter keeps a bfloat16 as the 16 bits of a numpy ``uint16``. Triton 3.8 converts those bits correctly only
between bfloat16 and fp32, and there it truncates where a GPU rounds to nearest even. Everything else treats the bits as
an integer: ``+ - * /`` and comparisons, negation, ``fma``, ``clamp``, reductions, and the operands of ``tl.dot``. None
of it raises. Inside ``correct_bf16`` each of these widens its operands to fp32, computes, and rounds to nearest even,
as the instructions of a GPU do (a product of two bfloat16 is exact in fp32, so ``tl.dot`` loses nothing either);
what is left, reductions and scans of bfloat16, raises. Selection, loads, stores and reshapes only move bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits nearest to fp32 values, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(values), quiet, nearest).reshape(np.shape(values))


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _fp32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _like(data: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """A result: rounded to bfloat16, or a comparison's booleans as they are."""
    return TensorHandle(data, tl.int1) if data.dtype == bool else TensorHandle(round_to_bf16(data), dtype.scalar)


def _cast(original):
    def cast_impl(self, source, target):
        wide = _fp32(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(round_to_bf16(wide.data.astype(np.float32)), target.scalar)
        return original(self, wide, target)

    return cast_impl


def _fp_to_fp(original):
    def create_fp_to_fp(self, source, target, rounding):
        if _is_bf16(source) or target.scalar == tl.bfloat16:
            if rounding not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
                raise NotImplementedError(f"bfloat16 with rounding mode {rounding}")
            return self.cast_impl(source, target)
        return original(self, source, target, rounding)

    return create_fp_to_fp


def _binary(original):
    def binary_op(self, lhs, rhs, op):
        if _is_bf16(lhs) or _is_bf16(rhs):
            return _like(op(_fp32(lhs).data, _fp32(rhs).data), lhs.dtype)
        return original(self, lhs, rhs, op)

    return binary_op


def _ternary(original):
    def ternary_op(self, lhs, rhs, other, op):
        if _is_bf16(other) and op is not np.where:
            return _like(op(_fp32(lhs).data, _fp32(rhs).data, _fp32(other).data), other.dtype)
        return original(self, lhs, rhs, other, op)

    return ternary_op


def _unary(original):
    def unary_op(self, argument, op):
        if _is_bf16(argument):
            return _like(op(_fp32(argument).data), argument.dtype)
        return original(self, argument, op)

    return unary_op


def _fma(original):
    def create_fma(self, x, y, z):
        if _is_bf16(z):
            exact = _fp32(x).data.astype(np.float64) * _fp32(y).data + _fp32(z).data
            return _like(exact.astype(np.float32), z.dtype)
        return original(self, x, y, z)

    return create_fma


def _dot(original):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original(self, _fp32(a), _fp32(b), d, input_precision, max_num_imprecise_acc)

    return create_dot


def _refuse(original):
    def apply_impl(self, operands):
        if any(operand.dtype == tl.bfloat16 for operand in operands):
            raise NotImplementedError("a reduction or scan of bfloat16: convert to fp32 first")
        return original(self, operands)

    return apply_impl


_PATCHES = (
    (InterpreterBuilder, "cast_impl", _cast),
    (InterpreterBuilder, "create_fp_to_fp", _fp_to_fp),
    (InterpreterBuilder, "binary_op", _binary),
    (InterpreterBuilder, "ternary_op", _ternary),
    (InterpreterBuilder, "unary_op", _unary),
    (InterpreterBuilder, "create_fma", _fma),
    (InterpreterBuilder, "create_dot", _dot),
    (ReduceOps, "apply_impl", _refuse),
    (ScanOps, "apply_impl", _refuse),
)


@contextlib.contextmanager
def correct_bf16() -> Iterator[None]:
    """Inside, interpreted kernels compute with bfloat16 as a GPU would."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _PATCHES:
            stack.enter_context(mock.patch.object(owner, name, replacement(getattr(owner, name))))
        yield
