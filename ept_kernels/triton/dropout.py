"""Dropout whose mask is replayed from a seed: Philox of an entry's row and column."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FROM_BATCH, Config, launch

_DROPOUT = Config.of(BLOCK=1024, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=(*FROM_BATCH, "p_drop"))
def dropout_kernel(
    x_ptr,  # [rows, columns] by strides
    seed_ptr,  # [1] int64
    out_ptr,  # [rows, columns]
    columns,
    stride_row,
    stride_column,
    p_drop,
    ONTO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    counter = column.to(tl.uint32)
    zero = counter * 0
    random, _, _, _ = tl.philox(tl.load(seed_ptr), counter, zero + low, zero + high, zero)
    kept = tl.uint_to_uniform_float(random) >= p_drop
    # A mask of what is kept would make every load that of one entry.
    x = tl.load(x_ptr + row * stride_row + column.to(tl.int64) * stride_column, mask=inside, other=0.0)
    values = tl.where(kept, x.to(tl.float32) / (1 - p_drop), 0.0)
    place = out_ptr + row * columns + column
    if ONTO:
        values += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, values.to(out_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, seed: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if onto is None else onto
    launch(
        dropout_kernel,
        (x.shape[0], triton.cdiv(x.shape[1], _DROPOUT["BLOCK"])),
        x,
        seed,
        out,
        x.shape[1],
        *x.stride(),
        p,
        config=_DROPOUT,
        ONTO=onto is not None,
    )
    return out
