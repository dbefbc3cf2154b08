// Factors repeated along the lanes as the strips want them, and the adjoint for their gradients.
#pragma once

#include "kernels.h"
#include "pairs.h"
#include "shrink.h"

namespace ept::EPT_ISA {

// Group of each lane: factor column j of lane l in vector v is v * copies + l / k, zero beyond the row or the strip.
static void pack_floats(const Layer& layer, const Side& side, const Strip& strip, const float* factor,
                        int64_t rank_stride, int64_t group_stride, float* to) {
    const int64_t k = layer.scales[strip.scale].k;
    each_rank_block(layer.rank, [&]<int R>(int64_t p) {
        // Whole vectors, a store for each group: it spills over the groups that follow, which are stored after it, and at
        // the end over the next vector. So the last one is not for this loop.
        const int64_t spilling = least(strip.whole, strip.vectors - 1);
        for (int64_t v = 0; v < spilling; ++v)
            for (int r = 0; r < R; ++r, to += W) {
                const float* from = factor + (p + r) * rank_stride + v * strip.copies * group_stride;
                for (int64_t lane = 0; lane < strip.lanes; lane += k, from += group_stride)
                    store(to + lane, F{} + *from);
                if (strip.lanes < W) store(to + strip.lanes, F{});
            }
        for (int64_t v = most(0, spilling); v < strip.vectors; ++v) {
            const int64_t lanes = least(lanes_inside(side, strip, v), strip.lanes);
            for (int r = 0; r < R; ++r, to += W) {
                const float* from = factor + (p + r) * rank_stride + v * strip.copies * group_stride;
                for (int64_t lane = 0; lane < W;) {
                    const float value = lane < lanes ? *from : 0.0f;
                    const int64_t next = lane < lanes ? least(lanes, lane + k) : W;
                    for (; lane < next; ++lane) to[lane] = value;
                    from += group_stride;
                }
            }
        }
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
                 int64_t rank_stride, int64_t group_stride, const Packed& packed) {
    const Strip& strip = side.strips[index];
#if defined(__AVX512BF16__)
    if (takes_pairs(dtype)) {  
        float* plain = static_cast<float*>(packed.plain) + layer.rank * strip.start;
        pack_floats(layer, side, strip, factor, rank_stride, group_stride, plain);
        return pack_pairs(layer, strip, plain, packed);
    }
#endif
    pack_floats(layer, side, strip, factor, rank_stride, group_stride,
                static_cast<float*>(packed.shrink) + layer.rank * strip.start);
}

// Adds to grad[j * group_stride], the gradient of rank p, the sums of the parts over the lanes of each group.
static void unpack(const Layer& layer, const Side& side, int index, int64_t rank, const float* const* parts, int count,
                   float* grad, int64_t group_stride) {
    const Strip& strip = side.strips[index];
    const int64_t k = layer.scales[strip.scale].k;
    each_rank_block(layer.rank, [&]<int R>(int64_t p) {
        if (rank < p || rank >= p + R) return;
        const int64_t start = layer.rank * strip.start + p * strip.vectors * W + (rank - p) * W;
        for (int64_t v = 0; v < strip.vectors; ++v) {
            F sum = {};
            for (int part = 0; part < count; ++part) sum += load(parts[part] + start + v * R * W);
            float lane_sums[W];
            store(lane_sums, sum);
            const int64_t lanes = least(lanes_inside(side, strip, v), strip.lanes);
            float* to = grad + v * strip.copies * group_stride;
            for (int64_t lane = 0; lane < lanes; to += group_stride) {
                float group = 0;
                for (const int64_t next = least(lanes, lane + k); lane < next; ++lane) group += lane_sums[lane];
                *to += group;
            }
        }
    });
}

}  // namespace ept::EPT_ISA
