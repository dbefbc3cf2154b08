// y (+)= V Bhat over the packed columns of the active scales. A block takes 64 rows by 128 features, a warp 16 rows.

#include "tensor_cores.cuh"

namespace ept::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kWarps * kTile;
constexpr int kFeatures = 128;
constexpr int kDepth = 32;  // packed columns staged at a time

template <typename T>
struct alignas(32) Shared {
  T V[kRows][kDepth + kVector];
  T dense[kDepth][kFeatures + kVector];
  Scratch scratch[kWarps];
  int column[kDepth];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ ExpandParams params) {
#if EPT_TENSOR_CORES
  EPT_SHARED(Shared<T>, shared);
  const Pyramid& pyramid = params.pyramid;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRows, end = min64(begin + kRows, params.rows);
  const int c0 = blockIdx.y * kFeatures;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t active = active_scales(pyramid, params.core, begin, end);
  if (active == 0 && params.accumulate) return;
  const T* dense = static_cast<const T*>(params.dense);
  const int total = packed_columns(pyramid, active);

  constexpr int kTiles = kFeatures / kTile;
  Accumulator sum[kTiles];
#pragma unroll
  for (int f = 0; f < kTiles; ++f) wmma::fill_fragment(sum[f], 0.0f);
  for (int start = 0; start < total; start += kDepth) {
    if (threadIdx.x < kDepth) shared.column[threadIdx.x] = packed_column(pyramid, active, start + threadIdx.x).column;
    __syncthreads();  // the columns are known, and the previous stage has been read
    for (int e = threadIdx.x; e < kRows * kDepth; e += kThreads) {
      const int t = e / kDepth, n = e % kDepth, column = shared.column[n];
      const bool exists = column >= 0 && begin + t < end;
      shared.V[t][n] = from_float<T>(exists ? params.V[(begin + t) * pyramid.columns + column] : 0.0f);
    }
    for (int v = threadIdx.x; v < kDepth * (kFeatures / kVector); v += kThreads) {
      const int n = v / (kFeatures / kVector), c = v % (kFeatures / kVector) * kVector, column = shared.column[n];
      *reinterpret_cast<Vector<T>*>(&shared.dense[n][c]) =
          column < 0 ? zero_vector<T>()
                     : *reinterpret_cast<const Vector<T>*>(dense + column * params.dense_stride + c0 + c);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kDepth; n += kTile) {
      wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, wmma::row_major> rows;
      wmma::load_matrix_sync(rows, &shared.V[warp * kTile][n], kDepth + kVector);
#pragma unroll
      for (int f = 0; f < kTiles; ++f) {
        wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, wmma::row_major> columns;
        wmma::load_matrix_sync(columns, &shared.dense[n][f * kTile], kFeatures + kVector);
        wmma::mma_sync(sum[f], rows, columns, sum[f]);
      }
    }
  }
#pragma unroll
  for (int f = 0; f < kTiles; ++f) {
    float(&tile)[kTile][kScratchStride] = shared.scratch[warp].tile;
    wmma::store_matrix_sync(&tile[0][0], sum[f], kScratchStride, wmma::mem_row_major);
    __syncwarp();
    for (int e = lane; e < kTile * kTile; e += kWarp) {
      const int64_t row = begin + warp * kTile + e / kTile;
      const int c = c0 + f * kTile + e % kTile;
      if (row >= end || c >= params.features) continue;
      T& element = static_cast<T*>(params.y)[row * params.y_stride + c];
      const float value = tile[e / kTile][e % kTile];
      element = from_float<T>(params.accumulate ? to_float(element) + value : value);
    }
    __syncwarp();
  }
#endif
}

}  // namespace

void expand_tensor_cores(const ExpandParams& params, Dtype dtype, cudaStream_t stream) {
  const dim3 grid(blocks(ceil_div<int64_t>(params.rows, kRows), "expand"), ceil_div(params.features, kFeatures));
  const auto kernel = dtype == Dtype::kFloat16 ? expand_kernel<__half> : expand_kernel<__nv_bfloat16>;
  launch("expand", kernel, grid, kThreads, stream, params);
}

}  // namespace ept::cuda
