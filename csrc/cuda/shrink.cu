// U[t, p, q] = sum_j F(p, j) x[t, j k + q], then V = U Kbar^T: one warp takes four rows of one scale.
// A lane keeps its q: lane l takes columns l, l + L, ... with L the largest multiple of k up to 32, so that each element
// of x costs one multiply-add per rank; lanes of equal q are summed at the end.

#include "core.cuh"

namespace ept::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRowsPerWarp = 4;
constexpr int kRowsPerBlock = kWarps * kRowsPerWarp;

template <typename T, int K>
__device__ void shrink_rows(const ShrinkParams& params, int s, int64_t row, int rows) {
  const int k = K > 0 ? K : params.pyramid.k[s];
  const int features = params.x.features, width = ceil_div(features, k), rank = params.pyramid.rank;
  const int period = k < kWarp ? k : kWarp;  // lanes with different q; a larger k takes several rounds
  const int lane = threadIdx.x % kWarp, replica = lane / period, replicas = kWarp / period;
  const T* x = static_cast<const T*>(params.x.data) + row * params.x.stride;
  for (int q0 = 0; q0 < k; q0 += period) {
    const int q = q0 + lane % period;
    const bool works = replica < replicas && q < k;
    for (int p0 = 0; p0 < rank; p0 += kRankBlock) {
      float sum[kRowsPerWarp][kRankBlock] = {};
      for (int j = replica; works && j < width; j += replicas) {
        const int c = j * k + q;
        if (c >= features) break;  // the last row of X is partly padding
        const float* factor = params.factor.data + p0 * params.factor.rank_stride + j * params.factor.index_stride;
        float value[kRowsPerWarp];
#pragma unroll
        for (int t = 0; t < kRowsPerWarp; ++t) value[t] = t < rows ? to_float(x[t * params.x.stride + c]) : 0.0f;
#pragma unroll
        for (int p = 0; p < kRankBlock; ++p) {
          const float weight = p0 + p < rank ? factor[p * params.factor.rank_stride] : 0.0f;
#pragma unroll
          for (int t = 0; t < kRowsPerWarp; ++t) sum[t][p] += weight * value[t];
        }
      }
      for (int left = replicas; left > 1; left = (left + 1) / 2) {  // a tree over lanes of equal q
        const int half = (left + 1) / 2;
#pragma unroll
        for (int t = 0; t < kRowsPerWarp; ++t) {
#pragma unroll
          for (int p = 0; p < kRankBlock; ++p) {
            const float other = __shfl_down_sync(0xffffffffu, sum[t][p], half * period);
            if (replica + half < left) sum[t][p] += other;
          }
        }
      }
      if (replica == 0 && works) {
        float* U = params.U + row * params.pyramid.columns + params.pyramid.column[s] + p0 * k + q;
#pragma unroll
        for (int t = 0; t < kRowsPerWarp; ++t) {
#pragma unroll
          for (int p = 0; p < kRankBlock; ++p) {
            if (t < rows && p0 + p < rank) U[static_cast<int64_t>(t) * params.pyramid.columns + p * k] = sum[t][p];
          }
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarps * kWarp) shrink_kernel(const __grid_constant__ ShrinkParams params) {
  const int s = blockIdx.y;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock;
  const int64_t end = min64(begin + kRowsPerBlock, params.rows);
  const bool active = scale_is_active(params.pyramid, params.core, s, begin, end);
  if (active || params.all_scales) {
    const int64_t row = begin + threadIdx.x / kWarp * kRowsPerWarp;
    const int rows = static_cast<int>(min64(end - row, kRowsPerWarp));
    if (rows > 0) {
      with_scale(params.pyramid.k[s], [&](auto scale) { shrink_rows<T, decltype(scale)::value>(params, s, row, rows); });
    }
  }
  __syncthreads();
  if (params.V != nullptr) {
    apply_core(params.pyramid, params.core, params.transposed, s, active, begin, end, params.U, params.V);
  }
}

}  // namespace

void shrink(const ShrinkParams& params, Dtype dtype, cudaStream_t stream) {
  const dim3 grid(blocks(ceil_div<int64_t>(params.rows, kRowsPerBlock), "shrink"), params.pyramid.count);
  const auto kernel = dtype == Dtype::kFloat32   ? shrink_kernel<float>
                      : dtype == Dtype::kFloat16 ? shrink_kernel<__half>
                                                 : shrink_kernel<__nv_bfloat16>;
  launch("shrink", kernel, grid, kWarps * kWarp, stream, params);
}

}  // namespace ept::cuda
