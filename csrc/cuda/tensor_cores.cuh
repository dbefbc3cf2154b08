// What the tensor-core kernels share. They see all active scales as one dense matrix: the columns of the active scales,
// packed, in tiles of 16. wmma needs sm_80 for bf16; older devices take the SIMT kernels and compile these empty.
#pragma once

#include <mma.h>

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define EPT_TENSOR_CORES 1
#else
#define EPT_TENSOR_CORES 0
#endif

namespace ept::cuda {

namespace wmma = nvcuda::wmma;

constexpr int kTile = 16;     // wmma is 16 x 16 x 16
constexpr int kMaxTiles = 10;  // column tiles that a warp accumulates at once: the default pyramid's r sum(k) = 160
constexpr int kMaxPacked = kTile * kMaxTiles;
constexpr int kVector = 8;    // halves in a 16-byte load
constexpr int kScratchStride = kTile + 4;  // of a warp's fp32 tile: a multiple of 16 bytes, off the bank stride

// One tile of fp32 results of a warp, on its way from fragments to masked global stores.
struct alignas(32) Scratch {
  float tile[kTile][kScratchStride];
};

using Accumulator = wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float>;

// Number of packed columns.
__device__ inline int packed_columns(const Pyramid& pyramid, uint32_t active) {
  int total = 0;
  for (int s = 0; s < pyramid.count; ++s) {
    if (active >> s & 1u) total += pyramid.rank * pyramid.k[s];
  }
  return total;
}

struct Packed {
  int column;  // in a row of intermediates, or -1 beyond the last
  int scale;
};

__device__ inline Packed packed_column(const Pyramid& pyramid, uint32_t active, int n) {
  for (int s = 0; s < pyramid.count; ++s) {
    if (!(active >> s & 1u)) continue;
    const int width = pyramid.rank * pyramid.k[s];
    if (n < width) return {pyramid.column[s] + n, s};
    n -= width;
  }
  return {-1, 0};
}

template <typename T>
struct alignas(16) Vector {
  T element[kVector];
};

// Rows of T may be read 16 bytes at a time.
__device__ inline bool rows_are_aligned(const Rows& x, size_t element) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * element % 16 == 0;
}

// Columns [c, c + 8) of a row of x; zeros beyond the last row or feature.
template <typename T>
__device__ inline Vector<T> load_vector(const Rows& x, bool aligned, int64_t row, int64_t end, int c) {
  const T* source = static_cast<const T*>(x.data) + row * x.stride + c;
  if (row < end && aligned && c + kVector <= x.features) return *reinterpret_cast<const Vector<T>*>(source);
  Vector<T> vector;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    vector.element[e] = row < end && c + e < x.features ? source[e] : from_float<T>(0.0f);
  }
  return vector;
}

template <typename T>
__device__ inline Vector<T> zero_vector() {
  Vector<T> vector;
#pragma unroll
  for (int e = 0; e < kVector; ++e) vector.element[e] = from_float<T>(0.0f);
  return vector;
}

}  // namespace ept::cuda
