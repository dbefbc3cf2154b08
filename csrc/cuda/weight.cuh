// What dense weights and their gradients share.
#pragma once

#include "common.cuh"

namespace ept::cuda {

// Z[i, j] = sum_p B[i, p] A[p, j], with a row of A `width` long.
__device__ inline float seed(const float* A, const float* B, int rank, int width, int i, int j) {
  float sum = 0.0f;
  for (int p = 0; p < rank; ++p) sum += B[static_cast<int64_t>(i) * rank + p] * A[static_cast<int64_t>(p) * width + j];
  return sum;
}

}  // namespace ept::cuda
