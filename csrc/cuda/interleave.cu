// The interleaved factors of all scales, which turn shrink and expand into plain matrix products; one launch for both.

#include "common.cuh"

namespace ept::cuda {
namespace {

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// A block writes a piece of one row (s, p, q); blockIdx.y chooses the factor.
template <typename T>
__global__ void __launch_bounds__(kThreads) interleave_kernel(const __grid_constant__ InterleaveParams params) {
  constexpr int kSize = Vector<T>::kSize;
  const bool left = blockIdx.y == 1;
  const int features = left ? params.out_features : params.in_features;
  const int longest = params.in_features > params.out_features ? params.in_features : params.out_features;
  const int pieces = ceil_div(longest, kThreads * kSize);
  const int64_t row = blockIdx.x / pieces;
  const int first = (blockIdx.x % pieces * kThreads + threadIdx.x) * kSize;
  if (first >= features) return;

  const Pyramid& pyramid = params.pyramid;
  const Block block = find_block(pyramid, [&](const Block& b) {
    return row < b.column + static_cast<int64_t>(pyramid.rank) * b.k;
  });
  const int k = block.k, p = static_cast<int>(row - block.column) / k, q = static_cast<int>(row - block.column) % k;
  const int64_t line = p * (left ? params.b_rank : params.a_rank), step = left ? params.b_index : params.a_index;
  T* out = static_cast<T*>(left ? params.B_hat : params.A_hat) + row * features + first;

  const void* factor = left ? params.B : params.A;

  Vector<T> vector;
  int j = first / k, slot = first % k;
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    const bool on = slot == q && first + v < features;
    vector.value[v] = from_float<T>(on ? load(factor, params.factor_dtype, line + j * step) : 0.0f);
    if (++slot == k) slot = 0, ++j;
  }
  if (features % kSize == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(vector) == 0) {
    *reinterpret_cast<Vector<T>*>(out) = vector;
    return;
  }
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    if (first + v < features) out[v] = vector.value[v];
  }
}

}  // namespace
}  // namespace ept::cuda

int ept_interleave(const ept::cuda::InterleaveParams* params, void* stream) {
  using namespace ept::cuda;
  const int longest = params->in_features > params->out_features ? params->in_features : params->out_features;
  const int piece = kThreads * (params->dtype == kFloat32 ? Vector<float>::kSize : Vector<__half>::kSize);
  const auto kernel = by_dtype(params->dtype, interleave_kernel<float>, interleave_kernel<__half>,
                               interleave_kernel<__nv_bfloat16>);
  return launch(kernel, params->pyramid.columns * ceil_div(longest, piece), 2, kThreads, stream, *params);
}
