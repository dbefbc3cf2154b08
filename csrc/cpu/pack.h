// Factors repeated along the lanes as the strips want them, and the adjoint for their gradients.
#pragma once

#include "kernels.h"
#include "pairs.h"
#include "shrink.h"

namespace ept::EPT_ISA {

// Group of each lane: factor column j of lane l in vector v is v * copies + l / k, zero beyond the row or the strip.
static void pack_floats(const Layer& layer, const Side& side, const Strip& strip, const float* factor,
                        int64_t rank_stride, float* to) {
    const int64_t k = layer.scales[strip.scale].k;
    with_size(k, [&]<int K>() {
        each_rank_block(layer.rank, [&]<int R>(int64_t p) {
            for (int64_t v = 0; v < strip.vectors; ++v) {
                const float* from = factor + p * rank_stride + v * strip.copies;
                const bool whole = v < strip.whole;
                const int64_t lanes = least(lanes_inside(side, strip, v), strip.lanes);
                for (int r = 0; r < R; ++r, from += rank_stride, to += W) {
                    if (K != 0 && whole) {
                        store(to, spread<K == 0 ? 1 : K>(load(from)));
                    } else if (lanes == W && strip.copies == 1) {
                        store(to, F{} + *from);
                    } else {
                        const float* group = from;
                        for (int64_t lane = 0; lane < lanes; ++group)
                            for (const int64_t next = least(lanes, lane + k); lane < next; ++lane) to[lane] = *group;
                        for (int64_t lane = lanes; lane < W; ++lane) to[lane] = 0;
                    }
                }
            }
        });
    });
}

static bool takes_pairs([[maybe_unused]] DType dtype) {
#if defined(__AVX512BF16__)
    return dtype == DType::bf16;
#else
    return false;
#endif
}

static void pack(const Layer& layer, const Side& side, int index, [[maybe_unused]] DType dtype, const float* factor,
                 int64_t rank_stride, const Packed& packed) {
    const Strip& strip = side.strips[index];
#if defined(__AVX512BF16__)
    if (takes_pairs(dtype)) {
        float* plain = static_cast<float*>(packed.plain) + layer.rank * strip.start;
        pack_floats(layer, side, strip, factor, rank_stride, plain);
        return pack_pairs(layer, strip, plain, packed);
    }
#endif
    pack_floats(layer, side, strip, factor, rank_stride,
                static_cast<float*>(packed.shrink) + layer.rank * strip.start);
}

// Adds to grad[j], the gradient of rank p, the sums of the parts over the lanes of each group.
static void unpack(const Layer& layer, const Side& side, int index, int64_t rank, const float* const* parts, int count,
                   float* grad) {
    const Strip& strip = side.strips[index];
    const int64_t k = layer.scales[strip.scale].k;
    with_size(k, [&]<int K>() {
        each_rank_block(layer.rank, [&]<int R>(int64_t p) {
            if (rank < p || rank >= p + R) return;
            const int64_t start = layer.rank * strip.start + p * strip.vectors * W + (rank - p) * W;
            float* to = grad;
            for (int64_t v = 0; v < strip.vectors; ++v, to += strip.copies) {
                F sum = {};
                for (int part = 0; part < count; ++part) sum += load(parts[part] + start + v * R * W);
                float sums[W];
                if (K != 0 && v < strip.whole) {
                    store(sums, sum_lanes<K == 0 ? 1 : K>(sum));
                    for (int c = 0; c < (K == 0 ? 0 : W / K); ++c) to[c] += sums[c * K];
                } else {
                    store(sums, sum);
                    const int64_t lanes = least(lanes_inside(side, strip, v), strip.lanes);
                    float* group = to;
                    for (int64_t lane = 0; lane < lanes; ++group) {
                        float total = 0;
                        for (const int64_t next = least(lanes, lane + k); lane < next; ++lane) total += sums[lane];
                        *group += total;
                    }
                }
            }
        });
    });
}

}  // namespace ept::EPT_ISA
