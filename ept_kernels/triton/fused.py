"""Plan ``fused``: the base product and the update in a single pass over the concatenated inner dimension.

y = [x | V] [W0 | Bhat]^T + b          dx = [dy | dU] [W0^T | Ahat]^T

The inner loop walks the columns of x and W0, then those of V and Bhat, into one accumulator; nothing is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FROM_BATCH, Config, launch
from .target import family
from .tune import choose, layout, row_bucket

#: Blocks of rows that walk over the same columns of the weight one after the other, while it is in L2.
_TOGETHER = tl.constexpr(8)


@triton.jit(do_not_specialize=FROM_BATCH)
def fused_kernel(
    x_ptr,  # [rows, inner]
    weight_ptr,  # [features, inner] by strides
    bias_ptr,  # [features], or None
    v_ptr,  # [rows, WIDTH]
    hat_ptr,  # [WIDTH, features]
    y_ptr,  # [rows, features] out
    rows,
    inner,
    features,
    stride_row,
    stride_feature,
    stride_inner,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    across, down = tl.cdiv(features, BLOCK_O), tl.cdiv(rows, BLOCK_T)
    band = tl.program_id(0) // (_TOGETHER * across)
    size = tl.minimum(down - band * _TOGETHER, _TOGETHER)
    inside_band = tl.program_id(0) % (_TOGETHER * across)
    first_t = (band * _TOGETHER + inside_band % size) * BLOCK_T
    first_o = (inside_band // size) * BLOCK_O
    # Rows and features beyond the last read others, so that only the inner dimension needs a mask. A remainder, not a
    # minimum: then the compiler still sees that neighbours are contiguous.
    t = first_t.to(tl.int64) + tl.arange(0, BLOCK_T) % tl.minimum(rows - first_t, BLOCK_T)
    o = first_o.to(tl.int64) + tl.arange(0, BLOCK_O) % tl.minimum(features - first_o, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    # The update comes first: behind the base product, ptxas serialises the matrix instructions of Triton 3.6 (C7515).
    x_tile = v_ptr + t[:, None] * WIDTH + i[None, :]
    w_tile = hat_ptr + i[:, None].to(tl.int64) * features + o[None, :]
    for start in range(0, WIDTH, BLOCK_I):
        x = tl.load(x_tile, mask=i[None, :] < WIDTH - start, other=0.0)
        w = tl.load(w_tile, mask=i[:, None] < WIDTH - start, other=0.0)
        total = tl.dot(x, w, total)
        x_tile += BLOCK_I
        w_tile += tl.cast(features, tl.int64) * BLOCK_I
    x_tile = x_ptr + t[:, None] * stride_row + i[None, :]
    w_tile = weight_ptr + i[:, None].to(tl.int64) * stride_inner + o[None, :] * stride_feature
    for start in range(0, inner, BLOCK_I):
        x = tl.load(x_tile, mask=i[None, :] < inner - start, other=0.0)
        w = tl.load(w_tile, mask=i[:, None] < inner - start, other=0.0)
        total = tl.dot(x, w, total)
        x_tile += BLOCK_I
        w_tile += tl.cast(stride_inner, tl.int64) * BLOCK_I
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o).to(tl.float32)[None, :]
    t, o = first_t + tl.arange(0, BLOCK_T), first_o + tl.arange(0, BLOCK_O)
    place = y_ptr + t[:, None].to(tl.int64) * features + o[None, :]
    tl.store(place, total.to(y_ptr.dtype.element_ty), mask=(t < rows)[:, None] & (o < features)[None, :])


def candidates(rows: int) -> list[Config]:
    """Tiles of the kernel on the current device, the default first."""
    if rows <= 64:
        block = max(16, triton.next_power_of_2(rows))
        return [
            Config.of(BLOCK_T=block, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=4),
            Config.of(BLOCK_T=block, BLOCK_O=32, BLOCK_I=128, num_warps=4, num_stages=3),
        ]
    if family() == "wide":
        return [
            Config.of(BLOCK_T=128, BLOCK_O=256, BLOCK_I=64, num_warps=8, num_stages=3),
            Config.of(BLOCK_T=256, BLOCK_O=128, BLOCK_I=64, num_warps=8, num_stages=3),
            Config.of(BLOCK_T=128, BLOCK_O=128, BLOCK_I=64, num_warps=8, num_stages=4),
        ]
    stages = 2 if family() == "cdna" else 3
    return [
        Config.of(BLOCK_T=128, BLOCK_O=128, BLOCK_I=32, num_warps=8, num_stages=stages),
        Config.of(BLOCK_T=128, BLOCK_O=64, BLOCK_I=32, num_warps=4, num_stages=stages),
    ]


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, V: Tensor, hat: Tensor) -> Tensor:
    """``x weight^T + bias + V hat``: ``[T, out]`` of x ``[T, in]``, weight ``[out, in]`` by strides, V ``[T, W]`` and
    hat ``[W, out]``, all of one half dtype.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, inner), features = x.shape, weight.shape[0]

    def start(config: Config) -> Tensor:
        y = torch.empty((rows, features), dtype=x.dtype, device=x.device)
        launch(
            fused_kernel,
            (triton.cdiv(rows, config["BLOCK_T"]) * triton.cdiv(features, config["BLOCK_O"]),),
            x,
            weight,
            bias,
            V,
            hat,
            y,
            rows,
            inner,
            features,
            x.stride(0),
            *weight.stride(),
            config=config,
            WIDTH=V.shape[1],
        )
        return y

    def key() -> tuple:
        return "fused", row_bucket(rows), inner, features, V.shape[1], x.dtype, layout(x), layout(weight)

    with torch.cuda.device_of(x):  # tiles follow the current device, and a layer need not be on it
        return start(choose(key, candidates(rows), x.device, start))
