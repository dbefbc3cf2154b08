// out (+)= x / (1 - p) where the mask keeps an entry, else 0. The mask is Philox4x32 of (row, column) under the seed, so
// that a later call replays it: one word for each entry, four neighbours from one evaluation.

#include "common.cuh"

namespace ept::cuda {
namespace {

constexpr int kRounds = 10;
constexpr int kQuad = 4;

template <typename T>
struct alignas(kQuad * sizeof(T)) Quad {
  T value[kQuad];
};

struct Words {
  uint32_t word[kQuad];
};

// Philox4x32-10 of Salmon and others, "Parallel random numbers: as easy as 1, 2, 3" (2011).
__device__ inline Words philox(uint64_t seed, uint32_t c0, uint64_t row) {
  uint32_t c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

template <typename T>
__device__ inline bool whole_quads(const T* data, int64_t stride, int columns) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Quad<T>) == 0 && stride % kQuad == 0 && columns % kQuad == 0;
}

// A thread takes four neighbouring entries of a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const __grid_constant__ DropoutParams params) {
  const int pieces = ceil_div(params.columns, kThreads * kQuad);
  const int64_t row = blockIdx.x / pieces;
  const int quad = blockIdx.x % pieces * kThreads + threadIdx.x, first = quad * kQuad;
  if (first >= params.columns) return;
  const T* x = static_cast<const T*>(params.x) + row * params.x_stride + first;
  T* out = static_cast<T*>(params.out) + row * params.out_stride + first;
  const int count = smaller(kQuad, params.columns - first);
  const bool vector = whole_quads(x, params.x_stride, params.columns) && whole_quads(out, params.out_stride, params.columns);

  Quad<T> in, old;
  if (vector) {
    in = *reinterpret_cast<const Quad<T>*>(x);
    if (params.accumulate) old = *reinterpret_cast<const Quad<T>*>(out);
  } else {
    for (int v = 0; v < kQuad; ++v) {
      in.value[v] = v < count ? x[v] : from_float<T>(0.0f);
      if (params.accumulate) old.value[v] = v < count ? out[v] : from_float<T>(0.0f);
    }
  }
  const Words random = philox(static_cast<uint64_t>(*params.seed), static_cast<uint32_t>(quad), static_cast<uint64_t>(row));
  Quad<T> result;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    const float kept = random.word[v] < params.threshold ? 0.0f : to_float(in.value[v]) * params.factor;
    result.value[v] = from_float<T>(params.accumulate ? to_float(old.value[v]) + kept : kept);
  }
  if (vector) {
    *reinterpret_cast<Quad<T>*>(out) = result;
  } else {
    for (int v = 0; v < count; ++v) out[v] = result.value[v];
  }
}

}  // namespace
}  // namespace ept::cuda

int ept_dropout(const ept::cuda::DropoutParams* params, void* stream) {
  using namespace ept::cuda;
  const int64_t blocks = params->rows * ceil_div(params->columns, kThreads * kQuad);
  const auto kernel =
      by_dtype(params->dtype, dropout_kernel<float>, dropout_kernel<__half>, dropout_kernel<__nv_bfloat16>);
  return launch(kernel, blocks, 1, kThreads, stream, *params);
}
