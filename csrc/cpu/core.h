// The k x k core between shrink and expand, for rows that share a kernel:
//   V = U Kbar^T    dU = dV Kbar    dKbar[a, q] = sum_{t, p} dV[t, p, a] U[t, p, q]
#pragma once

#include "vec.h"

namespace ept::EPT_ISA {

// result[r][lane] = sum over i < k of values[r][i] * table[i][lane], for `ranks` rows of `values`; the lanes of the
// result are repeated as those of the table, which is what expand and wgrad read.
static void apply_core(const Scale& scale, int64_t ranks, const float* values, const float* table, float* result) {
    const int64_t pitch = scale.pitch;
    each_rank_block(ranks, [&]<int R>(int64_t p) {
        for (int64_t lane = 0; lane < pitch; lane += W) {
            F acc[R] = {};
            for (int64_t i = 0; i < scale.k; ++i) {
                const F column = load(table + i * pitch + lane);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) acc[r] += column * values[(p + r) * pitch + i];
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) store(result + (p + r) * pitch + lane, acc[r]);
        }
    });
}

// sums[q][a] += sum over r of dV[r][a] * U[r][q], for `ranks` rows.
static void core_gradient(const Scale& scale, int64_t ranks, const float* U, const float* dV, float* sums) {
    const int64_t pitch = scale.pitch;
    each_rank_block(scale.k, [&]<int Q>(int64_t q) {
        for (int64_t lane = 0; lane < pitch; lane += W) {
            F acc[Q];
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) acc[i] = load(sums + (q + i) * pitch + lane);
            for (int64_t r = 0; r < ranks; ++r) {
                const F column = load(dV + r * pitch + lane);
#pragma GCC unroll 8
                for (int i = 0; i < Q; ++i) acc[i] += column * U[r * pitch + q + i];
            }
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) store(sums + (q + i) * pitch + lane, acc[i]);
        }
    });
}

}  // namespace ept::EPT_ISA
