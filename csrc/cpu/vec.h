// Vectors of `W` floats through the compiler's vector extension (GCC and Clang, on any processor), and the loads and
// stores that the kernels need. Everything here lives in the namespace of one instruction set and has internal linkage:
// a linker must never replace one set's code by another's.
#pragma once

#include <cstdint>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace ept::EPT_ISA {

constexpr int W = EPT_WIDTH;

typedef float F __attribute__((vector_size(4 * W)));
typedef std::uint32_t U __attribute__((vector_size(4 * W)));
typedef std::int32_t I __attribute__((vector_size(4 * W)));
typedef std::uint16_t H __attribute__((vector_size(2 * W)));
typedef float LooseF __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef std::uint16_t LooseH __attribute__((vector_size(2 * W), aligned(2), may_alias));

template <int... L>
struct Lanes {};
template <int Count, int... L>
struct CountLanes : CountLanes<Count - 1, Count - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
    using type = Lanes<L...>;
};
using AllLanes = CountLanes<W>::type;

struct bf16 {
    std::uint16_t bits;
};

#define EPT_INLINE static inline __attribute__((always_inline))
#define EPT_INLINE_METHOD inline __attribute__((always_inline))

EPT_INLINE F load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
EPT_INLINE void store(float* p, F v) { *reinterpret_cast<LooseF*>(p) = v; }

// A load for several uses: GCC would rather read memory again for each of them, and loads are what these loops wait for.
EPT_INLINE F load_once(const float* p) {
    F v = load(p);
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__SSE__)
    asm("" : "+x"(v));
#endif
    return v;
}

EPT_INLINE F load(const bf16* p) {
    const H half = *reinterpret_cast<const LooseH*>(p);
    return reinterpret_cast<F>(__builtin_convertvector(half, U) << 16);
}

// Rounds to nearest even; NaN stays NaN. The processor's own instruction takes subnormal numbers for zero.
#if defined(__AVX512BF16__)
EPT_INLINE H narrow(F v) { return reinterpret_cast<H>(_mm512_cvtneps_pbh(v)); }
#else
EPT_INLINE H narrow(F v) {
    const U bits = reinterpret_cast<U>(v);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U quiet = (bits >> 16) | 0x40u;
    const U is_nan = reinterpret_cast<U>(v != v);
    return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), H);
}
#endif
EPT_INLINE void store(bf16* p, F v) { *reinterpret_cast<LooseH*>(p) = narrow(v); }

// Lane l of the result is lane (l + N) % W of v.
template <int N, int... L>
EPT_INLINE F rotate_lanes(F v, Lanes<L...>) {
    return __builtin_shufflevector(v, v, ((L + N) % W)...);
}
template <int N>
EPT_INLINE F rotate(F v) {
    return rotate_lanes<N>(v, AllLanes{});
}

// Lane l of the result is lane l / K of v; lanes that whole copies of K do not fill are zero.
template <int K, int... L>
EPT_INLINE F spread_lanes(F v, Lanes<L...>) {
    return __builtin_shufflevector(v, F{}, (L < W / K * K ? L / K : W)...);
}
template <int K>
EPT_INLINE F spread(F v) {
    return spread_lanes<K>(v, AllLanes{});
}

// Lane l of the result is the sum of the lanes l, l + 1, ..., l + K - 1 of v, the first following the last.
template <int K>
EPT_INLINE F sum_lanes(F v) {
    if constexpr (K == 1) {
        return v;
    } else if constexpr (K % 2 == 0) {
        const F half = sum_lanes<K / 2>(v);
        return half + rotate<K / 2>(half);
    } else {
        return sum_lanes<K - 1>(v) + rotate<K - 1>(v);
    }
}

// Calls f.operator()<K>() with K = k where that is a usual size that fits a vector, else with 0.
template <class Function>
EPT_INLINE void with_size(int64_t k, Function f) {
    switch (k <= W ? k : 0) {
        case 1: return f.template operator()<1>();
        case 2: return f.template operator()<2>();
        case 3: return f.template operator()<W < 3 ? 0 : 3>();
        case 4: return f.template operator()<W < 4 ? 0 : 4>();
        case 6: return f.template operator()<W < 6 ? 0 : 6>();
        case 8: return f.template operator()<W < 8 ? 0 : 8>();
        default: return f.template operator()<0>();
    }
}

// The first `count` lanes, zeros behind them; touches no memory beyond.
#if defined(__AVX512BW__)
EPT_INLINE F load_part(const float* p, int64_t count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
EPT_INLINE F load_part(const bf16* p, int64_t count) {
    const H half = reinterpret_cast<H>(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
    return reinterpret_cast<F>(__builtin_convertvector(half, U) << 16);
}
EPT_INLINE void store_part(float* p, F v, int64_t count) { _mm512_mask_storeu_ps(p, (1u << count) - 1, v); }
#else
EPT_INLINE F load_part(const float* p, int64_t count) {
    F v = {};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
}
EPT_INLINE F load_part(const bf16* p, int64_t count) {
    U bits = {};
    for (int64_t i = 0; i < count; ++i) bits[i] = std::uint32_t{p[i].bits} << 16;
    return reinterpret_cast<F>(bits);
}
EPT_INLINE void store_part(float* p, F v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
#endif
EPT_INLINE void store_part(bf16* p, F v, int64_t count) {
    const H half = narrow(v);
    for (int64_t i = 0; i < count; ++i) p[i].bits = half[i];
}

// How a factor is stored for rows of E: floats, or pairs of bf16 where the processor multiplies those.
template <class E>
struct Factor {
    using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Factor<bf16> {
    using type = std::uint32_t;
};
#endif

EPT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
EPT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f.operator()<R>(p) for blocks of R ranks from rank p on: as large as the registers allow, then the rest.
template <class Function>
EPT_INLINE void each_rank_block(int64_t rank, Function f) {
    int64_t p = 0;
#if EPT_RANKS >= 8
    for (; rank - p >= 8; p += 8) f.template operator()<8>(p);
#endif
    for (; rank - p >= 4; p += 4) f.template operator()<4>(p);
    if (rank - p >= 2) f.template operator()<2>(p), p += 2;
    if (rank - p >= 1) f.template operator()<1>(p);
}

// Calls f.operator()<N>(i) for tiles of N from i on: three at a time, then the rest.
template <class Function>
EPT_INLINE void each_tile(int64_t begin, int64_t end, Function f) {
    int64_t i = begin;
    for (; end - i >= 3; i += 3) f.template operator()<3>(i);
    if (end - i == 2) f.template operator()<2>(i);
    if (end - i == 1) f.template operator()<1>(i);
}

}  // namespace ept::EPT_ISA
