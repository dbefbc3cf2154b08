// A long sum for each of a block's 32 outputs, in an order that depends on nothing but its length.
#pragma once

#include "common.cuh"

namespace ept::cuda {

constexpr int kReduceWarps = 8;
constexpr int kReduceThreads = kReduceWarps * kWarp;

struct ReduceShared {
  float part[kReduceWarps][kWarp];
};

// In warp 0, lane l: the sum of term(i) over 0 <= i < count for output l. Warp w adds up the terms w, w + 8, ...; a warp
// reads the same i for 32 neighbouring outputs. Every thread of the block must call it.
template <typename F>
__device__ inline float sum_across_warps(int count, ReduceShared& shared, F&& term) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum = 0.0f;
  for (int i = warp; i < count; i += kReduceWarps) sum += term(i);
  shared.part[warp][lane] = sum;
  __syncthreads();
  float total = 0.0f;
  if (warp == 0) {
    for (int w = 0; w < kReduceWarps; ++w) total += shared.part[w][lane];
  }
  return total;
}

}  // namespace ept::cuda
