// The passes for bf16 rows where the processor multiplies pairs of bf16 and adds both products to an fp32 lane: half the
// instructions of the fp32 form. A lane must hold two terms of its own sum, so each pass pairs what it sums over:
// shrink two vectors of a row, expand two ranks, the factor gradient two rows. Factors and intermediates are rounded to
// bf16 first, as any bf16 matrix product does; sums are fp32.
#pragma once

#if defined(__AVX512BF16__)

#include "expand.h"
#include "kernels.h"
#include "wgrad.h"

namespace ept::EPT_ISA {

typedef U LooseU __attribute__((aligned(4), may_alias));

EPT_INLINE U load_pairs(const std::uint32_t* p) { return *reinterpret_cast<const LooseU*>(p); }
EPT_INLINE U load_pairs_once(const std::uint32_t* p) {
    U v = load_pairs(p);
    asm("" : "+v"(v));  // see load_once
    return v;
}
EPT_INLINE void store_pairs(std::uint32_t* p, U v) { *reinterpret_cast<LooseU*>(p) = v; }

EPT_INLINE U widen(H half) { return __builtin_convertvector(half, U); }
EPT_INLINE U pair(F low, F high) { return widen(narrow(low)) | widen(narrow(high)) << 16; }

EPT_INLINE H load_half(const bf16* p) { return *reinterpret_cast<const LooseH*>(p); }
EPT_INLINE H load_half_part(const bf16* p, int64_t count) {
    return reinterpret_cast<H>(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
}

// Lane by lane: acc + low(a) low(b) + high(a) high(b).
EPT_INLINE F add_products(F acc, U a, U b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Vectors v and v + 1 of a row; lanes beyond the row, and a vector beyond the strip's last, are zero.
EPT_INLINE U two_vectors(const Side& side, const Strip& strip, const bf16* at, int64_t v) {
    const auto half = [&](int64_t vector, const bf16* p) {
        if (vector < strip.whole) return load_half(p);
        return vector < strip.vectors ? load_half_part(p, lanes_inside(side, strip, vector)) : H{};
    };
    return widen(half(v, at)) | widen(half(v + 1, at + strip.stride)) << 16;
}

// shrink_tile for vectors from..to, `from` even. factor: [pairs of vectors][R][W].
template <int R, int N>
EPT_INLINE void shrink_tile(const Side& side, const Strip& strip, const bf16* x, int64_t stride, int64_t from,
                                  int64_t to, const std::uint32_t* factor, float* raw, int64_t row, int64_t pitch) {
    F acc[N][R];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[n][r] = from ? load(raw + n * row + r * pitch) : F{};
    const auto add = [&](const U* values, const std::uint32_t* f) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const U weight = load_pairs_once(f + r * W);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[n][r] = add_products(acc[n][r], values[n], weight);
        }
    };
    const bf16* at = x + strip.offset + from * strip.stride;
    const std::uint32_t* f = factor + from / 2 * R * W;
    int64_t v = from;
    for (const int64_t whole = least(to, strip.whole); v + 2 <= whole; v += 2, at += 2 * strip.stride, f += R * W) {
        U values[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            values[n] = widen(load_half(at + n * stride)) | widen(load_half(at + n * stride + strip.stride)) << 16;
            __builtin_prefetch(at + (n + N) * stride);
        }
        add(values, f);
    }
    for (; v < to; v += 2, at += 2 * strip.stride, f += R * W) {
        U values[N];
        for (int n = 0; n < N; ++n) values[n] = two_vectors(side, strip, at + n * stride, v);
        add(values, f);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(raw + n * row + r * pitch, acc[n][r]);
}

template <int R, int N>
struct Terms<R, N, std::uint32_t> {
    static constexpr int step = (R + 1) / 2;
    U V[N][step];

    EPT_INLINE_METHOD Terms(const float* repeated, int64_t row, int64_t pitch) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
            for (int i = 0; i < step; ++i) {
                const float* at = repeated + n * row + 2 * i * pitch;
                V[n][i] = pair(load(at), 2 * i + 1 < R ? load(at + pitch) : F{});
            }
    }
    EPT_INLINE_METHOD void add(F* values, const std::uint32_t* f) const {
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i) {
            const U weight = load_pairs_once(f + i * W);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) values[n] = add_products(values[n], V[n][i], weight);
        }
    }
};

// dU of one scale as pairs of rows, [pairs][rank][pitch]; an odd last row goes with zeros.
static void pair_rows(int64_t rows, int64_t row, const float* dU, std::uint32_t* pairs) {
    for (int64_t t = 0; t < rows; t += 2, dU += 2 * row)
        for (int64_t i = 0; i < row; i += W, pairs += W)
            store_pairs(pairs, pair(load(dU + i), t + 1 < rows ? load(dU + row + i) : F{}));
}

// wgrad_tile on pairs of rows.
template <int R, int N>
EPT_INLINE void wgrad_tile(const bf16* x, int64_t stride, int64_t apart, int64_t count, int64_t rows,
                           const std::uint32_t* repeated, int64_t row, int64_t pitch, float* G) {
    F acc[N][R];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[n][r] = load(G + (n * R + r) * W);
    const auto half = [&](const bf16* p) __attribute__((always_inline)) {
        return count == W ? load_half(p) : load_half_part(p, count);
    };
    const auto add = [&](const U* values) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const U weight = load_pairs_once(repeated + r * pitch);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[n][r] = add_products(acc[n][r], values[n], weight);
        }
    };
    int64_t t = 0;
    for (; t + 2 <= rows; t += 2, x += 2 * stride, repeated += row) {
        U values[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) values[n] = widen(half(x + n * apart)) | widen(half(x + stride + n * apart)) << 16;
        add(values);
    }
    if (t < rows) {
        U values[N];
        for (int n = 0; n < N; ++n) values[n] = widen(half(x + n * apart));
        add(values);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) store(G + (n * R + r) * W, acc[n][r]);
}

// One strip of a packed factor, from floats to the pairs that shrink and expand want.
static void pack_pairs(const Layer& layer, const Strip& strip, const float* plain, const Packed& packed) {
    each_rank_block(layer.rank, [&]<int R>(int64_t p) {
        const int64_t at = layer.rank * strip.start + p * strip.vectors * W;
        const float* from = plain + p * strip.vectors * W;
        std::uint32_t* over_vectors = static_cast<std::uint32_t*>(packed.shrink) + at;
        std::uint32_t* over_ranks = static_cast<std::uint32_t*>(packed.expand) + at;
        for (int64_t v = 0; v < strip.vectors; ++v)
            for (int r = 0; r < R; ++r) {
                const float* one = from + (v * R + r) * W;
                if (v % 2 == 0)
                    store_pairs(over_vectors + (v / 2 * R + r) * W,
                                pair(load(one), v + 1 < strip.vectors ? load(one + R * W) : F{}));
                if (r % 2 == 0)
                    store_pairs(over_ranks + (v * ((R + 1) / 2) + r / 2) * W,
                                pair(load(one), r + 1 < R ? load(one + W) : F{}));
            }
    });
}

}  // namespace ept::EPT_ISA

#endif
