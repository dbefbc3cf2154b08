// y[t, c] (+)= sum_k sum_p V[t, p, c % k] F(p, c / k): a thread takes one column of eight rows.

#include "common.cuh"

namespace ept::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 8;

struct alignas(16) Shared {
  float V[kRankBlock * kLargestScale][kRows];  // one scale and rank block: [(p, a)][t], rows last for vector loads
};

template <int K>
__device__ void expand_scale(const ExpandParams& params, int s, int64_t row, int rows, int c, float (&sum)[kRows],
                             Shared& shared) {
  const int k = K > 0 ? K : params.pyramid.k[s];
  const int rank = params.pyramid.rank, i = c / k, a = c % k;
  const bool inside = c < params.features;
  const float* V = params.V + row * params.pyramid.columns + params.pyramid.column[s];
  const float* factor = params.factor.data + i * params.factor.index_stride;
  for (int p0 = 0; p0 < rank; p0 += kRankBlock) {
    if constexpr (K > 0) {
      __syncthreads();  // the previous block of V has been read
      for (int e = threadIdx.x; e < kRankBlock * K * kRows; e += kThreads) {
        const int t = e / (kRankBlock * K), column = e % (kRankBlock * K);
        const bool exists = t < rows && p0 * K + column < rank * K;
        shared.V[column][t] = exists ? V[static_cast<int64_t>(t) * params.pyramid.columns + p0 * K + column] : 0.0f;
      }
      __syncthreads();
    }
    if (!inside) continue;
#pragma unroll
    for (int p = 0; p < kRankBlock; ++p) {
      if (p0 + p >= rank) break;
      const float weight = factor[(p0 + p) * params.factor.rank_stride];
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        if constexpr (K > 0) {
          sum[t] += weight * shared.V[p * K + a][t];
        } else if (t < rows) {  // any scale: straight from global memory
          sum[t] += weight * V[static_cast<int64_t>(t) * params.pyramid.columns + (p0 + p) * k + a];
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ ExpandParams params) {
  EPT_SHARED(Shared, shared);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = static_cast<int>(min64(params.rows - row, kRows));
  const int c = blockIdx.y * kThreads + threadIdx.x;
  float sum[kRows] = {};
  const uint32_t active = active_scales(params.pyramid, params.core, row, row + rows);
  if (active == 0 && params.accumulate) return;
  for (int s = 0; s < params.pyramid.count; ++s) {
    if (!(active >> s & 1u)) continue;
    with_scale(params.pyramid.k[s], [&](auto scale) {
      expand_scale<decltype(scale)::value>(params, s, row, rows, c, sum, shared);
    });
  }
  if (c >= params.features) return;
  T* y = static_cast<T*>(params.y) + row * params.y_stride + c;
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    if (t >= rows) break;
    T& element = y[t * params.y_stride];
    element = from_float<T>(params.accumulate ? to_float(element) + sum[t] : sum[t]);
  }
}

}  // namespace

void expand(const ExpandParams& params, Dtype dtype, cudaStream_t stream) {
  const dim3 grid(blocks(ceil_div<int64_t>(params.rows, kRows), "expand"), ceil_div(params.features, kThreads));
  const auto kernel = dtype == Dtype::kFloat32   ? expand_kernel<float>
                      : dtype == Dtype::kFloat16 ? expand_kernel<__half>
                                                 : expand_kernel<__nv_bfloat16>;
  launch("expand", kernel, grid, kThreads, stream, params);
}

}  // namespace ept::cuda
