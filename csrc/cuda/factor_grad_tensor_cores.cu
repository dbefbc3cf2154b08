// H = V^T x over the rows of a chunk, for the packed columns of the active scales; of H[(s, p, a), c] only the entries
// with c % k == a are the gradient: partial[chunk, s, p, c]. A warp takes 16 features and up to 160 columns.

#include "tensor_cores.cuh"

namespace ept::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kFeatures = kWarps * kTile;
constexpr int kDepth = 32;  // rows staged at a time

template <typename T>
struct alignas(32) Shared {
  T V[kDepth][kMaxPacked + kVector];
  T x[kDepth][kFeatures + kVector];
  Scratch scratch[kWarps];
  Packed packed[kMaxPacked];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) factor_grad_kernel(const __grid_constant__ FactorGradParams params) {
#if EPT_TENSOR_CORES
  EPT_SHARED(Shared<T>, shared);
  const Pyramid& pyramid = params.pyramid;
  const int64_t begin = blockIdx.y * params.rows_per_chunk, end = min64(begin + params.rows_per_chunk, params.rows);
  const int c0 = blockIdx.x * kFeatures, features = params.x.features, rank = pyramid.rank;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t active = active_scales(pyramid, params.core, begin, end);
  const bool aligned = rows_are_aligned(params.x, sizeof(T));
  const int total = packed_columns(pyramid, active);
  float* partial = params.partial + static_cast<int64_t>(blockIdx.y) * pyramid.count * rank * features;

  for (int s = 0; s < pyramid.count; ++s) {  // V is zero where a scale is not active
    if (active >> s & 1u) continue;
    for (int e = threadIdx.x; e < rank * kFeatures; e += kThreads) {
      const int c = c0 + e % kFeatures;
      if (c < features) partial[(static_cast<int64_t>(s) * rank + e / kFeatures) * features + c] = 0.0f;
    }
  }
  for (int start = 0; start < total; start += kMaxPacked) {
    const int tiles = ceil_div(total - start < kMaxPacked ? total - start : kMaxPacked, kTile);
    __syncthreads();  // the previous round has read its columns
    for (int n = threadIdx.x; n < kMaxPacked; n += kThreads) {
      shared.packed[n] = packed_column(pyramid, active, start + n);
    }
    Accumulator sum[kMaxTiles];
#pragma unroll
    for (int f = 0; f < kMaxTiles; ++f) wmma::fill_fragment(sum[f], 0.0f);

    for (int64_t row = begin; row < end; row += kDepth) {
      __syncthreads();  // the previous stage has been read, and the columns are known
      for (int e = threadIdx.x; e < kDepth * tiles * kTile; e += kThreads) {
        const int t = e / (tiles * kTile), n = e % (tiles * kTile), column = shared.packed[n].column;
        const bool exists = column >= 0 && row + t < end;
        shared.V[t][n] = from_float<T>(exists ? params.V[(row + t) * pyramid.columns + column] : 0.0f);
      }
      for (int v = threadIdx.x; v < kDepth * (kFeatures / kVector); v += kThreads) {
        const int t = v / (kFeatures / kVector), c = v % (kFeatures / kVector) * kVector;
        *reinterpret_cast<Vector<T>*>(&shared.x[t][c]) = load_vector<T>(params.x, aligned, row + t, end, c0 + c);
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < kDepth; t += kTile) {
        wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, wmma::row_major> columns;
        wmma::load_matrix_sync(columns, &shared.x[t][warp * kTile], kFeatures + kVector);
#pragma unroll
        for (int f = 0; f < kMaxTiles; ++f) {
          if (f >= tiles) break;
          wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, wmma::col_major> rows;
          wmma::load_matrix_sync(rows, &shared.V[t][f * kTile], kMaxPacked + kVector);
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
        const Packed packed = shared.packed[f * kTile + e / kTile];
        const int c = c0 + warp * kTile + e % kTile;
        if (packed.column < 0 || c >= features) continue;
        const int k = pyramid.k[packed.scale], column = packed.column - pyramid.column[packed.scale];
        if (c % k != column % k) continue;
        partial[(static_cast<int64_t>(packed.scale) * rank + column / k) * features + c] = tile[e / kTile][e % kTile];
      }
      __syncwarp();
    }
  }
#endif
}

}  // namespace

void factor_grad_tensor_cores(const FactorGradParams& params, Dtype dtype, cudaStream_t stream) {
  const dim3 grid(ceil_div(params.x.features, kFeatures), params.chunks);
  const auto kernel = dtype == Dtype::kFloat16 ? factor_grad_kernel<__half> : factor_grad_kernel<__nv_bfloat16>;
  launch("factor_grad", kernel, grid, kThreads, stream, params);
}

}  // namespace ept::cuda
