// dense[(s, p, q), c] = F(p, c / k) where c % k == q, else 0: all scales as one matrix for the tensor cores.
// Rows end in zeros up to a multiple of the tile, so that the tiles need no mask.

#include "common.cuh"

namespace ept::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) interleave_kernel(const __grid_constant__ InterleaveParams params) {
  const Pyramid& pyramid = params.pyramid;
  const int64_t tiles = params.stride / kThreads, c = blockIdx.x % tiles * kThreads + threadIdx.x;
  const int column = static_cast<int>(blockIdx.x / tiles);
  int s = 0;
  while (s + 1 < pyramid.count && column >= pyramid.column[s + 1]) ++s;
  const int k = pyramid.k[s], p = (column - pyramid.column[s]) / k, q = (column - pyramid.column[s]) % k;
  const bool nonzero = c < params.features && c % k == q;
  const float value =
      nonzero ? params.factor.data[p * params.factor.rank_stride + c / k * params.factor.index_stride] : 0.0f;
  static_cast<T*>(params.dense)[column * params.stride + c] = from_float<T>(value);
}

}  // namespace

void interleave(const InterleaveParams& params, Dtype dtype, cudaStream_t stream) {
  const dim3 grid(blocks(params.stride / kThreads * params.pyramid.columns, "interleave"));
  const auto kernel = dtype == Dtype::kFloat16 ? interleave_kernel<__half> : interleave_kernel<__nv_bfloat16>;
  launch("interleave", kernel, grid, kThreads, stream, params);
}

}  // namespace ept::cuda
