// partial[chunk, s, p, c] = sum over the chunk's rows t of V[t, p, c % k] x[t, c]: a thread takes one column.
// With dU and x this is dA before the sum over q; with V and dy, dB. factor_reduce adds it up in a fixed order.

#include "common.cuh"

namespace ept::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16;

struct alignas(16) Shared {
  float V[kRows][kLargestScale][kRankBlock];  // one scale and rank block: [t][a][p], ranks last for vector loads
};

template <typename T, int K>
__device__ void grad_scale(const FactorGradParams& params, int s, int64_t begin, int64_t end, int c, Shared& shared) {
  const int k = K > 0 ? K : params.pyramid.k[s];
  const int rank = params.pyramid.rank, features = params.x.features, a = c % k;
  const bool inside = c < features;
  const T* x = static_cast<const T*>(params.x.data) + c;
  const float* V = params.V + params.pyramid.column[s];
  float* partial = params.partial + (static_cast<int64_t>(blockIdx.y) * params.pyramid.count + s) * rank * features + c;
  for (int p0 = 0; p0 < rank; p0 += kRankBlock) {
    float sum[kRankBlock] = {};
    for (int64_t row = begin; row < end; row += kRows) {
      const int rows = static_cast<int>(min64(end - row, kRows));
      if constexpr (K > 0) {
        __syncthreads();  // the previous block of V has been read
        for (int e = threadIdx.x; e < kRows * kRankBlock * K; e += kThreads) {
          const int t = e / (kRankBlock * K), column = e % (kRankBlock * K);
          const bool exists = t < rows && p0 * K + column < rank * K;
          shared.V[t][column % K][column / K] = exists ? V[(row + t) * params.pyramid.columns + p0 * K + column] : 0.0f;
        }
        __syncthreads();
      }
      if (!inside) continue;
      for (int t = 0; t < rows; ++t) {
        const float value = to_float(x[(row + t) * params.x.stride]);
#pragma unroll
        for (int p = 0; p < kRankBlock; ++p) {
          if constexpr (K > 0) {
            sum[p] += value * shared.V[t][a][p];
          } else if (p0 + p < rank) {  // any scale: straight from global memory
            sum[p] += value * V[(row + t) * params.pyramid.columns + (p0 + p) * k + a];
          }
        }
      }
    }
    if (!inside) continue;
#pragma unroll
    for (int p = 0; p < kRankBlock; ++p) {
      if (p0 + p < rank) partial[static_cast<int64_t>(p0 + p) * features] = sum[p];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) factor_grad_kernel(const __grid_constant__ FactorGradParams params) {
  EPT_SHARED(Shared, shared);
  const int64_t begin = blockIdx.y * params.rows_per_chunk;
  const int64_t end = min64(begin + params.rows_per_chunk, params.rows);
  const int c = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t active = active_scales(params.pyramid, params.core, begin, end);
  for (int s = 0; s < params.pyramid.count; ++s) {
    const int64_t rows_end = active >> s & 1u ? end : begin;  // V is zero: write zeros
    with_scale(params.pyramid.k[s], [&](auto scale) {
      grad_scale<T, decltype(scale)::value>(params, s, begin, rows_end, c, shared);
    });
  }
}

}  // namespace

void factor_grad(const FactorGradParams& params, Dtype dtype, cudaStream_t stream) {
  const dim3 grid(ceil_div(params.x.features, kThreads), params.chunks);
  const auto kernel = dtype == Dtype::kFloat32   ? factor_grad_kernel<float>
                      : dtype == Dtype::kFloat16 ? factor_grad_kernel<__half>
                                                 : factor_grad_kernel<__nv_bfloat16>;
  launch("factor_grad", kernel, grid, kThreads, stream, params);
}

}  // namespace ept::cuda
