// wmma on 16 x 16 x 16 tiles with fp32 accumulation. Lane l of a warp holds elements 8 l to 8 l + 7 of a tile, row by row;
// a product exchanges them in the runtime, which orders nothing else: like the hardware, no operation here is a barrier.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace shim {

constexpr int kSide = 16, kPerLane = kSide * kSide / 32;
void multiply_tiles(const float* a, const float* b, const float* c, float* d);
int lane();

inline float widen(__half value) { return __half2float(value); }
inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float widen(float value) { return value; }

// CUDA demands 32-byte aligned tiles and rows of whole 16 bytes.
inline void check_tile(const void* pointer, unsigned stride_bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32 == 0 && stride_bytes % 16 == 0) return;
  std::fprintf(stderr, "shim: wmma tile at %p with rows of %u bytes is not aligned\n", pointer, stride_bytes);
  std::abort();
}

}  // namespace shim

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == shim::kSide && N == shim::kSide && K == shim::kSide);
  float x[shim::kPerLane];
};

template <typename Fragment>
void fill_fragment(Fragment& fragment, float value) {
  for (float& element : fragment.x) element = value;
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& fragment, const T* source, unsigned stride) {
  shim::check_tile(source, stride * sizeof(T));
  for (int e = 0; e < shim::kPerLane; ++e) {
    const unsigned index = shim::lane() * shim::kPerLane + e, row = index / shim::kSide, column = index % shim::kSide;
    const bool by_rows = std::is_same_v<Layout, row_major>;
    fragment.x[e] = shim::widen(source[by_rows ? row * stride + column : column * stride + row]);
  }
}

inline void store_matrix_sync(float* target, const fragment<accumulator, 16, 16, 16, float>& fragment, unsigned stride,
                              layout_t) {
  shim::check_tile(target, stride * sizeof(float));
  for (int e = 0; e < shim::kPerLane; ++e) {
    const unsigned index = shim::lane() * shim::kPerLane + e;
    target[index / shim::kSide * stride + index % shim::kSide] = fragment.x[e];
  }
}

template <typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
  shim::multiply_tiles(a.x, b.x, c.x, d.x);
}

}  // namespace nvcuda::wmma
