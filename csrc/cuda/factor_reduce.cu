// out(p, j) = sum over chunks, scales and q of partial[chunk, s, p, j k + q], always in the same order.

#include "reduce.cuh"

namespace ept::cuda {
namespace {

__global__ void __launch_bounds__(kReduceThreads) factor_reduce_kernel(const __grid_constant__ FactorReduceParams params) {
  EPT_SHARED(ReduceShared, shared);
  const int rank = params.pyramid.rank, features = params.features;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool exists = output < static_cast<int64_t>(rank) * params.size;
  const int p = static_cast<int>(output / params.size), j = static_cast<int>(output % params.size);
  const float total = sum_across_warps(exists ? params.chunks : 0, shared, [&](int chunk) {
    float sum = 0.0f;
    for (int s = 0; s < params.pyramid.count; ++s) {
      const int64_t k = params.pyramid.k[s], row = (static_cast<int64_t>(chunk) * params.pyramid.count + s) * rank + p;
      const int64_t end = min64((j + 1) * k, features);  // a scale that has no column j adds nothing
      for (int64_t c = j * k; c < end; ++c) sum += params.partial[row * features + c];
    }
    return sum;
  });
  if (exists && threadIdx.x < kWarp) params.out[p * params.rank_stride + j * params.index_stride] = total;
}

}  // namespace

void factor_reduce(const FactorReduceParams& params, cudaStream_t stream) {
  const int64_t outputs = static_cast<int64_t>(params.pyramid.rank) * params.size;
  launch("factor_reduce", factor_reduce_kernel, dim3(blocks(ceil_div<int64_t>(outputs, kWarp), "factor_reduce")),
         kReduceThreads, stream, params);
}

}  // namespace ept::cuda
