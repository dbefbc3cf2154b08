// The adjoint of weight.cu, in passes whose sums have one order each:
//   M_k[i, j]       = sum_{g, a, q} grad[g, i k + a, j k + q] Kbar_k[g, a, q]     the gradient of the seed's part Z_k
//   dA[p, j]        = sum_k sum_i B[i, p] M_k[i, j]
//   dB[i, p]        = sum_k sum_j M_k[i, j] A[p, j]
//   dKbar_k[g, a, q] = sum_{i, j} grad[g, i k + a, j k + q] Z_k[i, j]

#include "weight.cuh"

namespace ept::cuda {
namespace {

__device__ int height(const WeightGradParams& params, int s) {
  return ceil_div(params.out_features, scale_of(params.pyramid, s));
}
__device__ int width(const WeightGradParams& params, int s) {
  return ceil_div(params.in_features, scale_of(params.pyramid, s));
}

__global__ void __launch_bounds__(kThreads) seed_grad_kernel(const __grid_constant__ WeightGradParams params) {
  const int64_t size = static_cast<int64_t>(params.out_features) * params.in_features;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t e = position;
  const Block block = find_block(params.pyramid, [&](const Block& b) {
    const int64_t elements = static_cast<int64_t>(height(params, b.s)) * width(params, b.s);
    if (e < elements) return true;
    e -= elements;
    return false;
  });
  if (block.s == params.pyramid.count) return;
  const int k = block.k, w = width(params, block.s);
  const int o0 = static_cast<int>(e / w) * k, c0 = static_cast<int>(e % w) * k;
  const int rows = params.out_features - o0 < k ? params.out_features - o0 : k;
  const int columns = params.in_features - c0 < k ? params.in_features - c0 : k;
  float sum = 0.0f;
  for (int64_t group = 0; group < params.groups; ++group) {
    const float* kernel = params.folded + group * params.pyramid.folded + block.offset;
    const float* grad = params.grad + group * size + static_cast<int64_t>(o0) * params.in_features + c0;
    for (int a = 0; a < rows; ++a) {
      const float* line = grad + static_cast<int64_t>(a) * params.in_features;
      for (int q = 0; q < columns; ++q) sum += line[q] * kernel[static_cast<int64_t>(a) * k + q];
    }
  }
  params.seed_grad[position] = sum;
}

// One thread for every (p, j).
__global__ void __launch_bounds__(kThreads) right_grad_kernel(const __grid_constant__ WeightGradParams params) {
  const int size = width(params, 0);
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= static_cast<int64_t>(params.pyramid.rank) * size) return;
  const int p = static_cast<int>(e / size), j = static_cast<int>(e % size);
  const float* M = params.seed_grad;
  float sum = 0.0f;
  for (int s = 0; s < params.pyramid.count; ++s) {
    const int h = height(params, s), w = width(params, s);
    for (int i = 0; j < w && i < h; ++i) {
      sum += params.B[static_cast<int64_t>(i) * params.pyramid.rank + p] * M[static_cast<int64_t>(i) * w + j];
    }
    M += static_cast<int64_t>(h) * w;
  }
  params.grad_A[e] = sum;
}

// One warp for every (i, p).
__global__ void __launch_bounds__(kThreads) left_grad_kernel(const __grid_constant__ WeightGradParams params) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (e >= static_cast<int64_t>(params.pyramid.rank) * height(params, 0)) return;
  const int p = static_cast<int>(e % params.pyramid.rank), i = static_cast<int>(e / params.pyramid.rank);
  const int seed_width = width(params, 0);
  const float* M = params.seed_grad;
  float sum = 0.0f;
  for (int s = 0; s < params.pyramid.count; ++s) {
    const int h = height(params, s), w = width(params, s);
    for (int j = threadIdx.x % kWarp; i < h && j < w; j += kWarp) {
      sum += params.A[static_cast<int64_t>(p) * seed_width + j] * M[static_cast<int64_t>(i) * w + j];
    }
    M += static_cast<int64_t>(h) * w;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) params.grad_B[e] = sum;
}

struct Shared {
  float sum[kThreads / kWarp];
};

// One block for every entry (g, s, a, q).
__global__ void __launch_bounds__(kThreads) folded_grad_kernel(const __grid_constant__ WeightGradParams params) {
  EPT_SHARED(Shared, shared);
  const Pyramid& pyramid = params.pyramid;
  const int64_t group = blockIdx.x / pyramid.folded;
  const int64_t entry = blockIdx.x % pyramid.folded;
  const Block block = find_block(pyramid, [&](const Block& b) {
    return entry < b.offset + static_cast<int64_t>(b.k) * b.k;
  });
  const int k = block.k, a = static_cast<int>(entry - block.offset) / k, q = static_cast<int>(entry - block.offset) % k;
  const int seed_width = width(params, 0);
  const int rows = ceil_div(params.out_features - a, k), columns = ceil_div(params.in_features - q, k);
  const float* grad = params.grad + group * params.out_features * params.in_features;
  float sum = 0.0f;
  for (int64_t e = threadIdx.x; e < static_cast<int64_t>(rows) * columns; e += kThreads) {
    const int i = static_cast<int>(e / columns), j = static_cast<int>(e % columns);
    sum += grad[(static_cast<int64_t>(i) * k + a) * params.in_features + static_cast<int64_t>(j) * k + q] *
           seed(params.A, params.B, pyramid.rank, seed_width, i, j);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) shared.sum[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += shared.sum[warp];
  params.grad_folded[blockIdx.x] = total;
}

}  // namespace
}  // namespace ept::cuda

int ept_weight_grad(const ept::cuda::WeightGradParams* params, void* stream) {
  using namespace ept::cuda;
  const Pyramid& pyramid = params->pyramid;
  const int64_t rank = pyramid.rank;
  int error = cudaSuccess;
  const auto run = [&](bool wanted, void (*kernel)(WeightGradParams), int64_t work, int per_block) {
    if (!wanted || error != cudaSuccess) return;
    error = launch(kernel, ceil_div<int64_t>(work, per_block), 1, kThreads, stream, *params);
  };
  run(params->seed_grad != nullptr, seed_grad_kernel, params->seed_size, kThreads);
  run(params->grad_A != nullptr, right_grad_kernel, rank * params->width, kThreads);
  run(params->grad_B != nullptr, left_grad_kernel, rank * params->height, kThreads / kWarp);
  run(params->grad_folded != nullptr, folded_grad_kernel, params->groups * pyramid.folded, 1);
  return error;
}
