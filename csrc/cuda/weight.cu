// out[g, o, c] = (base[o, c] +) sum_k Z_k[o / k, c / k] Kbar_k[g, o % k, c % k] with Z_k = B_k A_k: the dense update of a
// group, or the merged weight. A block takes a tile of 16 x 64 and computes the part of Z_k that it needs once.

#include "weight.cuh"

namespace ept::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTileRows = 16, kTileColumns = 64;
constexpr int kRowStep = kThreads / kTileColumns;  // a thread takes every second row of one column
constexpr int kPerThread = kTileRows / kRowStep;

struct Shared {
  float Z[kTileRows][kTileColumns];  // at scale 1 as large as the tile
};

template <int K>
__device__ void add_scale(const WeightParams& params, const float* kernel, int s, int o0, int c0,
                          float (&sum)[kPerThread], Shared& shared) {
  const int k = K > 0 ? K : params.pyramid.k[s];
  const int i0 = o0 / k, j0 = c0 / k;
  const int last_o = o0 + kTileRows < params.out_features ? o0 + kTileRows - 1 : params.out_features - 1;
  const int last_c = c0 + kTileColumns < params.in_features ? c0 + kTileColumns - 1 : params.in_features - 1;
  const int height = last_o / k - i0 + 1, width = last_c / k - j0 + 1;
  __syncthreads();  // the previous scale's Z has been read
  for (int e = threadIdx.x; e < height * width; e += kThreads) {
    shared.Z[e / width][e % width] = seed(params.A, params.B, params.pyramid.rank, i0 + e / width, j0 + e % width);
  }
  __syncthreads();
  const int c = c0 + threadIdx.x % kTileColumns, o = o0 + threadIdx.x / kTileColumns;
  if (c > last_c) return;
  const int j = c / k - j0, q = c % k;
#pragma unroll
  for (int n = 0; n < kPerThread; ++n) {
    const int row = o + n * kRowStep;
    if (row <= last_o) sum[n] += shared.Z[row / k - i0][j] * kernel[row % k * k + q];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) weight_kernel(const __grid_constant__ WeightParams params) {
  EPT_SHARED(Shared, shared);
  const int tiles = ceil_div(params.in_features, kTileColumns);
  const int o0 = blockIdx.x / tiles * kTileRows, c0 = blockIdx.x % tiles * kTileColumns;
  const int64_t size = static_cast<int64_t>(params.out_features) * params.in_features;
  const T* base = static_cast<const T*>(params.base);
  for (int64_t group = blockIdx.y; group < params.groups; group += gridDim.y) {
    const float* folded = params.folded + group * params.pyramid.folded;
    float sum[kPerThread] = {};
    for (int s = 0; s < params.pyramid.count; ++s) {
      with_scale(params.pyramid.k[s], [&](auto scale) {
        add_scale<decltype(scale)::value>(params, folded + params.pyramid.offset[s], s, o0, c0, sum, shared);
      });
    }
    T* out = static_cast<T*>(params.out) + group * size;
    const int c = c0 + threadIdx.x % kTileColumns, o = o0 + threadIdx.x / kTileColumns;
    if (c >= params.in_features) continue;
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const int row = o + n * kRowStep;
      if (row >= params.out_features) break;
      const int64_t position = static_cast<int64_t>(row) * params.in_features + c;
      out[position] = from_float<T>(base == nullptr ? sum[n] : to_float(base[position]) + sum[n]);
    }
  }
}

}  // namespace

void weight_forward(const Problem& problem, const void* base, void* out, cudaStream_t stream) {
  const int64_t groups = problem.core.groups.count;
  if (groups == 0) return;
  const WeightParams params{problem.pyramid,      problem.A,             problem.B, problem.core.folded, groups,
                            problem.in_features, problem.out_features, base,      out};
  const int64_t tiles = static_cast<int64_t>(ceil_div(problem.out_features, kTileRows)) *
                        ceil_div(problem.in_features, kTileColumns);
  const dim3 grid(blocks(tiles, "weight"), static_cast<unsigned>(groups < kMaxGridY ? groups : kMaxGridY));
  const auto kernel = problem.dtype == Dtype::kFloat32   ? weight_kernel<float>
                      : problem.dtype == Dtype::kFloat16 ? weight_kernel<__half>
                                                         : weight_kernel<__nv_bfloat16>;
  launch("weight", kernel, grid, kThreads, stream, params);
}

}  // namespace ept::cuda
