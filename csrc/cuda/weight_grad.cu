// The adjoint of weight.cu, in passes whose sums have one order each:
//   M_k[i, j]       = sum_{g, a, q} grad[g, i k + a, j k + q] Kbar_k[g, a, q]     the gradient of the seed's part Z_k
//   dA[p, j]        = sum_k sum_i B[i, p] M_k[i, j]
//   dB[i, p]        = sum_k sum_j M_k[i, j] A[p, j]
//   dKbar_k[g, a, q] = sum_{i, j} grad[g, i k + a, j k + q] Z_k[i, j]

#include "weight.cuh"

namespace ept::cuda {
namespace {

constexpr int kThreads = 128;

struct WeightGradParams {
  Pyramid pyramid;
  Factor A;
  Factor B;
  const float* folded;
  int64_t groups;
  int in_features;
  int out_features;
  const float* grad;  // [groups, out, in]
  float* M;           // one [ceil(out / k), ceil(in / k)] for every scale, back to back
  float* dA;
  float* dB;
  float* dfolded;
};

__device__ int height(const WeightGradParams& params, int s) { return ceil_div(params.out_features, params.pyramid.k[s]); }
__device__ int width(const WeightGradParams& params, int s) { return ceil_div(params.in_features, params.pyramid.k[s]); }

__global__ void __launch_bounds__(kThreads) seed_grad_kernel(const __grid_constant__ WeightGradParams params) {
  const int64_t size = static_cast<int64_t>(params.out_features) * params.in_features;
  int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t position = e;
  int s = 0;
  for (; s < params.pyramid.count; ++s) {
    const int64_t elements = static_cast<int64_t>(height(params, s)) * width(params, s);
    if (e < elements) break;
    e -= elements;
  }
  if (s == params.pyramid.count) return;
  const int k = params.pyramid.k[s], w = width(params, s);
  const int o0 = static_cast<int>(e / w) * k, c0 = static_cast<int>(e % w) * k;
  const int rows = params.out_features - o0 < k ? params.out_features - o0 : k;
  const int columns = params.in_features - c0 < k ? params.in_features - c0 : k;
  float sum = 0.0f;
  for (int64_t group = 0; group < params.groups; ++group) {
    const float* kernel = params.folded + group * params.pyramid.folded + params.pyramid.offset[s];
    const float* grad = params.grad + group * size + static_cast<int64_t>(o0) * params.in_features + c0;
    for (int a = 0; a < rows; ++a) {
      for (int q = 0; q < columns; ++q) sum += grad[static_cast<int64_t>(a) * params.in_features + q] * kernel[a * k + q];
    }
  }
  params.M[position] = sum;
}

// One thread for every (p, j).
__global__ void __launch_bounds__(kThreads) right_grad_kernel(const __grid_constant__ WeightGradParams params) {
  const int size = width(params, 0);
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= static_cast<int64_t>(params.pyramid.rank) * size) return;
  const int p = static_cast<int>(e / size), j = static_cast<int>(e % size);
  const float* M = params.M;
  float sum = 0.0f;
  for (int s = 0; s < params.pyramid.count; ++s) {
    const int h = height(params, s), w = width(params, s);
    for (int i = 0; j < w && i < h; ++i) {
      sum += params.B.data[p * params.B.rank_stride + i * params.B.index_stride] * M[static_cast<int64_t>(i) * w + j];
    }
    M += static_cast<int64_t>(h) * w;
  }
  params.dA[e] = sum;
}

// The sum of `value` over a warp, in lane 0.
__device__ float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

// One warp for every (i, p).
__global__ void __launch_bounds__(kThreads) left_grad_kernel(const __grid_constant__ WeightGradParams params) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (e >= static_cast<int64_t>(params.pyramid.rank) * height(params, 0)) return;
  const int p = static_cast<int>(e % params.pyramid.rank), i = static_cast<int>(e / params.pyramid.rank);
  const float* M = params.M;
  float sum = 0.0f;
  for (int s = 0; s < params.pyramid.count; ++s) {
    const int h = height(params, s), w = width(params, s);
    for (int j = threadIdx.x % kWarp; i < h && j < w; j += kWarp) {
      sum += params.A.data[p * params.A.rank_stride + j * params.A.index_stride] * M[static_cast<int64_t>(i) * w + j];
    }
    M += static_cast<int64_t>(h) * w;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) params.dB[e] = sum;
}

struct Shared {
  float sum[kThreads / kWarp];
};

// One block for every entry (g, s, a, q).
__global__ void __launch_bounds__(kThreads) folded_grad_kernel(const __grid_constant__ WeightGradParams params) {
  EPT_SHARED(Shared, shared);
  const Pyramid& pyramid = params.pyramid;
  const int64_t group = blockIdx.x / pyramid.folded;
  const int entry = blockIdx.x % pyramid.folded;
  int s = 0;
  while (s + 1 < pyramid.count && entry >= pyramid.offset[s + 1]) ++s;
  const int k = pyramid.k[s], a = (entry - pyramid.offset[s]) / k, q = (entry - pyramid.offset[s]) % k;
  const int rows = ceil_div(params.out_features - a, k), columns = ceil_div(params.in_features - q, k);
  const float* grad = params.grad + group * params.out_features * params.in_features;
  float sum = 0.0f;
  for (int64_t e = threadIdx.x; e < static_cast<int64_t>(rows) * columns; e += kThreads) {
    const int i = static_cast<int>(e / columns), j = static_cast<int>(e % columns);
    sum += grad[(static_cast<int64_t>(i) * k + a) * params.in_features + j * k + q] *
           seed(params.A, params.B, pyramid.rank, i, j);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) shared.sum[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += shared.sum[warp];
  params.dfolded[blockIdx.x] = total;
}

}  // namespace

void weight_backward(const Problem& problem, const float* grad, const Gradients& gradients, Allocator& scratch,
                     cudaStream_t stream) {
  const Pyramid& pyramid = problem.pyramid;
  const int64_t groups = problem.core.groups.count;
  int64_t elements = 0;
  for (int s = 0; s < pyramid.count; ++s) {
    elements += static_cast<int64_t>(ceil_div(problem.out_features, pyramid.k[s])) *
                ceil_div(problem.in_features, pyramid.k[s]);
  }
  WeightGradParams params{pyramid,
                          problem.A,
                          problem.B,
                          problem.core.folded,
                          groups,
                          problem.in_features,
                          problem.out_features,
                          grad,
                          nullptr,
                          gradients.A,
                          gradients.B,
                          gradients.folded};
  const auto run = [&](const char* name, void (*kernel)(WeightGradParams), int64_t work, int per_block) {
    if (work > 0) launch(name, kernel, dim3(blocks(ceil_div<int64_t>(work, per_block), name)), kThreads, stream, params);
  };
  if (gradients.A != nullptr || gradients.B != nullptr) {
    params.M = static_cast<float*>(scratch.allocate(elements * sizeof(float)));
    run("seed_grad", seed_grad_kernel, elements, kThreads);
  }
  const int64_t rank = pyramid.rank;
  if (gradients.A != nullptr) {
    run("right_grad", right_grad_kernel, rank * ceil_div(problem.in_features, pyramid.k[0]), kThreads);
  }
  if (gradients.B != nullptr) {
    run("left_grad", left_grad_kernel, rank * ceil_div(problem.out_features, pyramid.k[0]), kThreads / kWarp);
  }
  if (gradients.folded != nullptr) run("folded_grad", folded_grad_kernel, groups * pyramid.folded, 1);
}

}  // namespace ept::cuda
