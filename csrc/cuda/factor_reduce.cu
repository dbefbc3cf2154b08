// out(p, j) = sum over chunks, scales and q of partial[chunk, s, p, j k + q], always in the same order.

#include "common.cuh"

namespace ept::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) factor_reduce_kernel(const __grid_constant__ FactorReduceParams params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int rank = params.pyramid.rank, features = params.features;
  if (i >= static_cast<int64_t>(rank) * params.size) return;
  const int p = static_cast<int>(i / params.size), j = static_cast<int>(i % params.size);
  float sum = 0.0f;
  for (int chunk = 0; chunk < params.chunks; ++chunk) {
    for (int s = 0; s < params.pyramid.count; ++s) {
      const int64_t k = params.pyramid.k[s], row = (static_cast<int64_t>(chunk) * params.pyramid.count + s) * rank + p;
      const int64_t end = min64((j + 1) * k, features);  // a scale that has no column j adds nothing
      for (int64_t c = j * k; c < end; ++c) sum += params.partial[row * features + c];
    }
  }
  params.out[p * params.rank_stride + j * params.index_stride] = sum;
}

}  // namespace

void factor_reduce(const FactorReduceParams& params, cudaStream_t stream) {
  const int64_t outputs = static_cast<int64_t>(params.pyramid.rank) * params.size;
  launch("factor_reduce", factor_reduce_kernel, dim3(blocks(ceil_div<int64_t>(outputs, kThreads), "factor_reduce")),
         kThreads, stream, params);
}

}  // namespace ept::cuda
