// U[t, p, q] = sum_j A[p, j] x[t, j * k + q]: one fused multiply-add per vector of x and rank, whatever k.
#pragma once

#include "vec.h"

namespace ept::EPT_ISA {

// Vectors of a factor that stay in the first-level cache while the rows of a block pass by.
constexpr int64_t shrink_chunk = 48 * 8 / EPT_RANKS * 16 / W;

// Lanes of vector v that lie inside the row.
EPT_INLINE int64_t lanes_inside(const Side& side, const Strip& strip, int64_t v) {
    return least(W, side.features - strip.offset - v * strip.stride);
}

// Adds vectors from..to of N rows to raw[n][r], which starts at zero where `from` is 0.
template <int R, int N, class E>
EPT_INLINE void shrink_tile(const Side& side, const Strip& strip, const E* x, int64_t stride, int64_t from, int64_t to,
                            const float* factor, float* raw, int64_t row, int64_t pitch) {
    F acc[N][R];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[n][r] = from ? load(raw + n * row + r * pitch) : F{};
    const auto add = [&](const F* values, const float* f) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F weight = load_once(f + r * W);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[n][r] += values[n] * weight;
        }
    };
    const E* at = x + strip.offset + from * strip.stride;
    const float* f = factor + from * R * W;
    int64_t v = from;
    for (const int64_t whole = least(to, strip.whole); v < whole; ++v, at += strip.stride, f += R * W) {
        F values[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            values[n] = load(at + n * stride);
            __builtin_prefetch(at + (n + N) * stride);  // the next rows: a short row ends before hardware learns
        }
        add(values, f);
    }
    for (; v < to; ++v, at += strip.stride, f += R * W) {
        F values[N];
        const int64_t count = lanes_inside(side, strip, v);
        for (int n = 0; n < N; ++n) values[n] = load_part(at + n * stride, count);
        add(values, f);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(raw + n * row + r * pitch, acc[n][r]);
}

// Sums the copies of a vector: lane q of each rank becomes the sum over the lanes q, q + k, q + 2k, ...
static void fold_copies(const Scale& scale, int copies, int64_t vectors, float* raw) {
    for (int64_t i = 0; i < vectors; ++i, raw += W) {
        F sum = load(raw);
        for (int c = 1; c < copies; ++c) sum += load(raw + c * scale.k);  // lanes beyond k hold rubbish, never read
        store(raw, sum);
    }
}

// One strip of a block of rows. raw: this scale's intermediates of the block, [rows][rank][pitch].
template <class E, class P>
static void shrink(const Layer& layer, const Side& side, const Strip& strip, const E* x, int64_t stride, int64_t rows,
                   const P* packed, float* raw) {
    const Scale& scale = layer.scales[strip.scale];
    const int64_t pitch = scale.pitch, row = layer.rank * pitch;
    const int64_t chunks = most(1, (strip.vectors + shrink_chunk - 1) / shrink_chunk);
    const auto start_of = [&](int64_t chunk) {  // even: a pair stays together
        return chunk == chunks ? strip.vectors : chunk * strip.vectors / chunks / 2 * 2;
    };
    each_rank_block(layer.rank, [&]<int R>(int64_t p) {
        const P* factor = packed + layer.rank * strip.start + p * strip.vectors * W;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t from = start_of(chunk), to = start_of(chunk + 1);
            each_tile(0, rows, [&]<int N>(int64_t t) {
                shrink_tile<R, N>(side, strip, x + t * stride, stride, from, to, factor,
                                  raw + t * row + p * pitch + strip.offset, row, pitch);
            });
        }
    });
    if (strip.copies > 1) fold_copies(scale, strip.copies, rows * layer.rank, raw);
}

}  // namespace ept::EPT_ISA
