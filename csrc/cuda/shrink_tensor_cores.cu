// U = x Ahat^T for all active scales in one read of x, then V = U Kbar^T. A block takes 64 rows, a warp 16 of them and up
// to 160 columns of U; more columns take more rounds over x.

#include "core.cuh"
#include "tensor_cores.cuh"

namespace ept::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kWarps * kTile;
constexpr int kDepth = 64;             // features staged at a time
constexpr int kStride = kDepth + kVector;  // keeps the rows of a fragment on different banks

template <typename T>
struct alignas(32) Shared {
  T x[kRows][kStride];
  T dense[kMaxPacked][kStride];
  Scratch scratch[kWarps];
  int column[kMaxPacked];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) shrink_kernel(const __grid_constant__ ShrinkParams params) {
#if EPT_TENSOR_CORES
  EPT_SHARED(Shared<T>, shared);
  const Pyramid& pyramid = params.pyramid;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRows, end = min64(begin + kRows, params.rows);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t active = active_scales(pyramid, params.core, begin, end);
  const uint32_t wanted = params.all_scales ? ~0u : active;
  const bool aligned = rows_are_aligned(params.x, sizeof(T));
  const T* dense = static_cast<const T*>(params.dense);
  const int total = packed_columns(pyramid, wanted);

  for (int start = 0; start < total; start += kMaxPacked) {
    const int tiles = ceil_div(total - start < kMaxPacked ? total - start : kMaxPacked, kTile);
    __syncthreads();  // the previous round has read its columns
    for (int n = threadIdx.x; n < kMaxPacked; n += kThreads) {
      shared.column[n] = packed_column(pyramid, wanted, start + n).column;
    }
    Accumulator sum[kMaxTiles];
#pragma unroll
    for (int f = 0; f < kMaxTiles; ++f) wmma::fill_fragment(sum[f], 0.0f);

    for (int c0 = 0; c0 < params.x.features; c0 += kDepth) {
      __syncthreads();  // the previous stage has been read, and the columns are known
      for (int v = threadIdx.x; v < kRows * (kDepth / kVector); v += kThreads) {
        const int t = v / (kDepth / kVector), c = v % (kDepth / kVector) * kVector;
        *reinterpret_cast<Vector<T>*>(&shared.x[t][c]) = load_vector<T>(params.x, aligned, begin + t, end, c0 + c);
      }
      for (int v = threadIdx.x; v < tiles * kTile * (kDepth / kVector); v += kThreads) {
        const int n = v / (kDepth / kVector), c = v % (kDepth / kVector) * kVector, column = shared.column[n];
        *reinterpret_cast<Vector<T>*>(&shared.dense[n][c]) =
            column < 0 ? zero_vector<T>()
                       : *reinterpret_cast<const Vector<T>*>(dense + column * params.dense_stride + c0 + c);
      }
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kDepth; c += kTile) {
        wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, wmma::row_major> rows;
        wmma::load_matrix_sync(rows, &shared.x[warp * kTile][c], kStride);
#pragma unroll
        for (int f = 0; f < kMaxTiles; ++f) {
          if (f >= tiles) break;
          wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, wmma::col_major> columns;
          wmma::load_matrix_sync(columns, &shared.dense[f * kTile][c], kStride);
          wmma::mma_sync(sum[f], rows, columns, sum[f]);
        }
      }
    }
#pragma unroll
    for (int f = 0; f < kMaxTiles; ++f) {
      if (f >= tiles) break;
      float(&tile)[kTile][kScratchStride] = shared.scratch[warp].tile;
      wmma::store_matrix_sync(&tile[0][0], sum[f], kScratchStride, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < kTile * kTile; e += kWarp) {
        const int64_t row = begin + warp * kTile + e / kTile;
        const int column = shared.column[f * kTile + e % kTile];
        if (row < end && column >= 0) params.U[row * pyramid.columns + column] = tile[e / kTile][e % kTile];
      }
      __syncwarp();
    }
  }
  if (params.V == nullptr) return;
  __syncthreads();  // U is complete
  for (int s = 0; s < pyramid.count; ++s) {
    apply_core(pyramid, params.core, params.transposed, s, active >> s & 1u, begin, end, params.U, params.V);
  }
#endif
}

}  // namespace

void shrink_tensor_cores(const ShrinkParams& params, Dtype dtype, cudaStream_t stream) {
  const dim3 grid(blocks(ceil_div<int64_t>(params.rows, kRows), "shrink"));
  const auto kernel = dtype == Dtype::kFloat16 ? shrink_kernel<__half> : shrink_kernel<__nv_bfloat16>;
  launch("shrink", kernel, grid, kThreads, stream, params);
}

}  // namespace ept::cuda
