// What dense weights and their gradients share.
#pragma once

#include "common.cuh"

namespace ept::cuda {

constexpr int64_t kMaxGridY = 65535;

struct WeightParams {
  Pyramid pyramid;
  Factor A;
  Factor B;
  const float* folded;
  int64_t groups;
  int in_features;
  int out_features;
  const void* base;
  void* out;
};

// Z[i, j] = sum_p B[i, p] A[p, j]
__device__ inline float seed(const Factor& A, const Factor& B, int rank, int i, int j) {
  float sum = 0.0f;
  for (int p = 0; p < rank; ++p) {
    sum += B.data[p * B.rank_stride + i * B.index_stride] * A.data[p * A.rank_stride + j * A.index_stride];
  }
  return sum;
}

}  // namespace ept::cuda
