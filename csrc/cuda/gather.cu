// The adjoint of interleave: a thread sums, over scales and slots, the gradients of the copies of one number.

#include "common.cuh"

namespace ept::cuda {
namespace {

template <typename T>
__device__ float sum_of_copies(const Pyramid& pyramid, const void* grad, int features, int p, int j) {
  float sum = 0.0f;
  int64_t column = 0;
  for (int s = 0; s < pyramid.count; ++s) {
    const int k = scale_of(pyramid, s);
    const int64_t first = static_cast<int64_t>(j) * k;
    const int slots = static_cast<int>(smaller<int64_t>(k, features - first));  // none where the scale lacks this j
    const T* copy = static_cast<const T*>(grad) + (column + static_cast<int64_t>(p) * k) * features + first;
#pragma unroll 4
    for (int q = 0; q < slots; ++q) sum += to_float(copy[q * (static_cast<int64_t>(features) + 1)]);
    column += static_cast<int64_t>(pyramid.rank) * k;
  }
  return sum;
}

// blockIdx.y chooses the factor. Neighbouring threads take neighbouring j: they read neighbouring numbers.
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams params) {
  const bool left = blockIdx.y == 1;
  const void* grad = left ? params.B_hat : params.A_hat;
  const int size = left ? params.height : params.width, rank = params.pyramid.rank;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (grad == nullptr || index >= static_cast<int64_t>(rank) * size) return;
  const int p = static_cast<int>(index / size), j = static_cast<int>(index % size);
  const int features = left ? params.out_features : params.in_features;
  float sum;
  switch (left ? params.b_dtype : params.a_dtype) {
    case kFloat16: sum = sum_of_copies<__half>(params.pyramid, grad, features, p, j); break;
    case kBFloat16: sum = sum_of_copies<__nv_bfloat16>(params.pyramid, grad, features, p, j); break;
    default: sum = sum_of_copies<float>(params.pyramid, grad, features, p, j);
  }
  if (left) {
    params.B[static_cast<int64_t>(j) * rank + p] = sum;
  } else {
    params.A[index] = sum;
  }
}

}  // namespace
}  // namespace ept::cuda

int ept_gather(const ept::cuda::GatherParams* params, void* stream) {
  using namespace ept::cuda;
  const int64_t longest = params->width > params->height ? params->width : params->height;
  const int64_t blocks = ceil_div<int64_t>(params->pyramid.rank * longest, kThreads);
  return launch(gather_kernel, blocks, 2, kThreads, stream, *params);
}
