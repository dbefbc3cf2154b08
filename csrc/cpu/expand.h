// y[t, i * k + a] += sum_p B[i, p] V[t, p, a]: one fused multiply-add per vector of y and rank, V repeated along the lanes.
#pragma once

#include "shrink.h"

namespace ept::EPT_ISA {

constexpr int64_t expand_chunk = shrink_chunk;

// What one vector of each of N rows gains: sum over R ranks of V times the factor. V stays in registers.
template <int R, int N, class P>
struct Terms;

template <int R, int N>
struct Terms<R, N, float> {
    static constexpr int step = R;  // vectors of the factor for one of y
    F V[N][R];

    EPT_INLINE_METHOD Terms(const float* repeated, int64_t row, int64_t pitch) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) V[n][r] = load(repeated + n * row + r * pitch);
    }
    EPT_INLINE_METHOD void add(F* values, const float* f) const {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F weight = load_once(f + r * W);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) values[n] += V[n][r] * weight;
        }
    }
};

// Lanes beyond a strip's own have zeros in the factor: they are written back as they were, and vector v + 1 is read
// before v is written, so neighbours that overlap neither lose an update nor wait for a store.
template <int R, int N, class P>
EPT_INLINE void expand_tile(const Side& side, const Strip& strip, float* y, int64_t stride, int64_t from, int64_t to,
                            const P* factor, const float* repeated, int64_t row, int64_t pitch) {
    Terms<R, N, P> terms(repeated, row, pitch);
    const auto add = [&](F* values, const P* f) __attribute__((always_inline)) { terms.add(values, f); };
    constexpr int64_t step = Terms<R, N, P>::step * W;
    float* at = y + strip.offset + from * strip.stride;
    const P* f = factor + from * step;
    const int64_t whole = least(to, strip.whole);
    int64_t v = from;
    if (strip.lanes == W) {
        for (; v < whole; ++v, at += strip.stride, f += step) {
            F values[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) values[n] = load(at + n * stride);
            add(values, f);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) store(at + n * stride, values[n]);
        }
    } else if (v < whole) {
        F next[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) next[n] = load(at + n * stride);
        for (; v + 1 < whole; ++v, at += strip.stride, f += step) {
            F values[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                values[n] = next[n];
                next[n] = load(at + n * stride + strip.stride);
            }
            add(values, f);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) store(at + n * stride, values[n]);
        }
        add(next, f);
        for (int n = 0; n < N; ++n) store_part(at + n * stride, next[n], strip.lanes);
        ++v, at += strip.stride, f += step;
    }
    for (; v < to; ++v, at += strip.stride, f += step) {
        F values[N];
        const int64_t count = least(lanes_inside(side, strip, v), strip.lanes);
        for (int n = 0; n < N; ++n) values[n] = load_part(at + n * stride, count);
        add(values, f);
        for (int n = 0; n < N; ++n) store_part(at + n * stride, values[n], count);
    }
}

// One strip, one chunk of its vectors, a block of rows. repeated: this scale's V of the block, [rows][rank][pitch].
template <class P>
static void expand(const Layer& layer, const Side& side, const Strip& strip, int64_t from, int64_t to, float* y,
                   int64_t stride, int64_t rows, const P* packed, const float* repeated) {
    const int64_t pitch = layer.scales[strip.scale].pitch, row = layer.rank * pitch;
    each_rank_block(layer.rank, [&]<int R>(int64_t p) {
        const P* factor = packed + layer.rank * strip.start + p * strip.vectors * W;
        each_tile(0, rows, [&]<int N>(int64_t t) {
            expand_tile<R, N>(side, strip, y + t * stride, stride, from, to, factor,
                              repeated + t * row + p * pitch + strip.offset, row, pitch);
        });
    });
}

}  // namespace ept::EPT_ISA
