// dA[p, j] = sum over t, q of dU[t, p, q] x[t, j * k + q], first without the sum over q: one fused multiply-add per vector
// of x and rank into G[vector, p, lane], dU repeated along the lanes; then the lanes are summed.
#pragma once

#include "shrink.h"

namespace ept::EPT_ISA {

// Adds N vectors of a block of rows to G[n][r].
template <int R, int N, class E>
EPT_INLINE void wgrad_tile(const E* x, int64_t stride, int64_t apart, int64_t count, int64_t rows,
                           const float* repeated, int64_t row, int64_t pitch, float* G) {
    F acc[N][R];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[n][r] = load(G + (n * R + r) * W);
    for (int64_t t = 0; t < rows; ++t, x += stride, repeated += row) {
        F values[N];
        if (count == W) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) values[n] = load(x + n * apart);
        } else {
            for (int n = 0; n < N; ++n) values[n] = load_part(x + n * apart, count);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F weight = load_once(repeated + r * pitch);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[n][r] += values[n] * weight;
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(G + (n * R + r) * W, acc[n][r]);
}

// One strip of a block of rows. repeated: this scale's dU of the block; sums: laid out as the packed factor.
template <class E, class P>
static void wgrad(const Layer& layer, const Side& side, const Strip& strip, const E* x, int64_t stride, int64_t rows,
                  const P* repeated, float* sums) {
    const int64_t pitch = layer.scales[strip.scale].pitch, row = layer.rank * pitch;
    each_rank_block(layer.rank, [&]<int R>(int64_t p) {
        float* G = sums + layer.rank * strip.start + p * strip.vectors * W;
        const P* dU = repeated + p * pitch + strip.offset;
        each_tile(0, strip.whole, [&]<int N>(int64_t v) {
            wgrad_tile<R, N>(x + strip.offset + v * strip.stride, stride, strip.stride, W, rows, dU, row, pitch,
                             G + v * R * W);
        });
        for (int64_t v = strip.whole; v < strip.vectors; ++v)
            wgrad_tile<R, 1>(x + strip.offset + v * strip.stride, stride, 0, lanes_inside(side, strip, v), rows, dU,
                             row, pitch, G + v * R * W);
    });
}

}  // namespace ept::EPT_ISA
