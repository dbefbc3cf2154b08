// The k x k core of the pyramid, applied by the block that computed the rows of U:
//   V[t, p, a] = sum_q U[t, p, q] Kbar[g(t), a, q]    transposed: Kbar[g(t), q, a]
#pragma once

#include "common.cuh"

namespace ept::cuda {

// Rows [begin, end) of scale s; zero where the scale is not active. U was written by this block: call after a barrier.
__device__ inline void apply_core(const Pyramid& pyramid, const Core& core, bool transposed, int s, bool active,
                                  int64_t begin, int64_t end, const float* U, float* V) {
  const int k = pyramid.k[s], width = pyramid.rank * k;
  const int total = static_cast<int>(end - begin) * width;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int64_t row = begin + i / width;
    const int column = i % width, a = column % k;
    const int64_t position = row * pyramid.columns + pyramid.column[s] + column;
    float sum = 0.0f;
    if (active) {
      const float* kernel = core.folded + group_of(core.groups, row) * pyramid.folded + pyramid.offset[s];
      const float* u = U + position - a;
      for (int q = 0; q < k; ++q) sum += u[q] * kernel[transposed ? q * k + a : a * k + q];
    }
    V[position] = sum;
  }
}

}  // namespace ept::cuda
