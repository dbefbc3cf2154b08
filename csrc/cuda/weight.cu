// out[g, o, c] = (base[o, c] +) sum_k Z_k[o / k, c / k] Kbar_k[g, o % k, c % k] with Z_k = B_k A_k: the dense update of a
// group, or the merged weight. A block takes a tile of 16 x 64 and computes the part of Z_k that it needs once.

#include "weight.cuh"

namespace ept::cuda {
namespace {

constexpr int kMaxGroups = 65535;  // that a grid holds; more take turns
constexpr int kTileRows = 16, kTileColumns = 64;
constexpr int kRowStep = kThreads / kTileColumns;  // a thread takes every second row of one column
constexpr int kPerThread = kTileRows / kRowStep;

struct Shared {
  float Z[kTileRows][kTileColumns];  // at scale 1 as large as the tile
};

__device__ void add_scale(const WeightParams& params, const float* kernel, int k, int o0, int c0,
                          float (&sum)[kPerThread], Shared& shared) {
  const int seed_width = ceil_div(params.in_features, scale_of(params.pyramid, 0));
  const int i0 = o0 / k, j0 = c0 / k;
  const int last_o = o0 + kTileRows < params.out_features ? o0 + kTileRows - 1 : params.out_features - 1;
  const int last_c = c0 + kTileColumns < params.in_features ? c0 + kTileColumns - 1 : params.in_features - 1;
  const int height = last_o / k - i0 + 1, width = last_c / k - j0 + 1;
  __syncthreads();  // the previous scale's Z has been read
  for (int e = threadIdx.x; e < height * width; e += kThreads) {
    shared.Z[e / width][e % width] =
        seed(params.A, params.B, params.pyramid.rank, seed_width, i0 + e / width, j0 + e % width);
  }
  __syncthreads();
  const int c = c0 + threadIdx.x % kTileColumns, o = o0 + threadIdx.x / kTileColumns;
  if (c > last_c) return;
  const int j = c / k - j0, q = c % k;
  int i = o / k - i0, a = o % k;
#pragma unroll
  for (int n = 0; n < kPerThread; ++n) {
    if (o + n * kRowStep <= last_o) sum[n] += shared.Z[i][j] * kernel[static_cast<int64_t>(a) * k + q];
    for (a += kRowStep; a >= k; a -= k) ++i;
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
      const int k = scale_of(params.pyramid, s);
      add_scale(params, folded, k, o0, c0, sum, shared);
      folded += static_cast<int64_t>(k) * k;
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
}  // namespace ept::cuda

int ept_weight(const ept::cuda::WeightParams* params, void* stream) {
  using namespace ept::cuda;
  const int groups = static_cast<int>(smaller<int64_t>(params->groups, kMaxGroups));
  if (groups == 0) return cudaSuccess;
  const int64_t tiles = static_cast<int64_t>(ceil_div(params->out_features, kTileRows)) *
                        ceil_div(params->in_features, kTileColumns);
  const auto kernel =
      by_dtype(params->dtype, weight_kernel<float>, weight_kernel<__half>, weight_kernel<__nv_bfloat16>);
  return launch(kernel, tiles, groups, kThreads, stream, *params);
}
