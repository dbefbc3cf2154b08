// The k x k core of the pyramid and its adjoint:
//   V[t, p, a]         = sum_q Kbar[g(t), a, q] U[t, p, q]
//   dU[t, p, q]        = sum_a Kbar[g(t), a, q] dV[t, p, a]
//   grad_folded[g, a, q] = sum of dV[t, p, a] U[t, p, q] over p and the rows t of group g, in a fixed order
// Where a group does not use a scale, V, dU and the gradient are zero and nothing is read. A row whose group does not
// exist becomes NaN and adds to nobody's gradient.

#include "common.cuh"

namespace ept::cuda {
namespace {

// The group of a row, which need not be one of params.groups.
__device__ int64_t group_of(const CoreParams& params, int64_t row) {
  if (params.ids == nullptr) return 0;
  int64_t index = row;
  if (params.rows_per_id != 1) {  // a division of 64 bits takes some hundred instructions
    const bool small = ((row | params.rows_per_id) >> 32) == 0;
    index = small ? static_cast<uint32_t>(row) / static_cast<uint32_t>(params.rows_per_id) : row / params.rows_per_id;
  }
  return params.wide_ids ? static_cast<const int64_t*>(params.ids)[index] : static_cast<const int32_t*>(params.ids)[index];
}

// The folded kernel of a row for one scale; or what the row becomes without one.
struct RowKernel {
  const float* kernel;
  float fill;
};

__device__ RowKernel kernel_of(const CoreParams& params, const Block& block, int64_t row) {
  const int64_t group = group_of(params, row);
  if (group < 0 || group >= params.groups) return {nullptr, NAN};
  if (params.active != nullptr && !params.active[group * params.pyramid.count + block.s]) return {nullptr, 0.0f};
  return {params.folded + group * params.pyramid.folded + block.offset, 0.0f};
}

// Common scales: a thread multiplies the kernel with the slots of one row and rank, in registers.
template <int K, typename T>
__device__ void apply_fixed(const CoreParams& params, const Block& block, int64_t begin, int count, const T* in, T* out,
                            bool transposed) {
  const int rank = params.pyramid.rank;
  for (int i = threadIdx.x; i < count * rank; i += kThreads) {
    const int64_t row = begin + i / rank;
    const int64_t place = row * params.pyramid.columns + block.column + i % rank * K;
    const auto [kernel, fill] = kernel_of(params, block, row);
    float value[K], sum[K];
#pragma unroll
    for (int q = 0; q < K; ++q) {
      value[q] = kernel == nullptr ? 0.0f : to_float(in[place + q]);
      sum[q] = fill;
    }
    if (kernel != nullptr && transposed) {
#pragma unroll
      for (int a = 0; a < K; ++a) {
#pragma unroll
        for (int q = 0; q < K; ++q) sum[q] += kernel[a * K + q] * value[a];
      }
    } else if (kernel != nullptr) {
#pragma unroll
      for (int a = 0; a < K; ++a) {
#pragma unroll
        for (int q = 0; q < K; ++q) sum[a] += kernel[a * K + q] * value[q];
      }
    }
#pragma unroll
    for (int q = 0; q < K; ++q) out[place + q] = from_float<T>(sum[q]);
  }
}

// Any scale: a thread for every number.
template <typename T>
__device__ void apply_any(const CoreParams& params, const Block& block, int64_t begin, int count, const T* in, T* out,
                          bool transposed) {
  const int k = block.k, width = params.pyramid.rank * k;
  const int64_t line = transposed ? 1 : k, step = transposed ? k : 1;
  for (int i = threadIdx.x; i < count * width; i += kThreads) {  // at most kThreads * k, or one row's columns
    const int64_t row = begin + i / width;
    const int column = i % width, a = column % k;
    const int64_t place = row * params.pyramid.columns + block.column + column;
    const auto [kernel, fill] = kernel_of(params, block, row);
    float sum = fill;
    if (kernel != nullptr) {
      for (int q = 0; q < k; ++q) sum += kernel[a * line + q * step] * to_float(in[place - a + q]);
    }
    out[place] = from_float<T>(sum);
  }
}

// Rows of a block: one for each thread and rank.
__host__ __device__ inline int rows_per_block(int rank) { return rank < kThreads ? kThreads / rank : 1; }

// A block takes some rows of one scale; blockIdx.y chooses between U -> V and dV -> dU.
template <typename T>
__global__ void __launch_bounds__(kThreads) core_kernel(const __grid_constant__ CoreParams params) {
  const Pyramid& pyramid = params.pyramid;
  const bool transposed = blockIdx.y == 1 || params.V == nullptr;
  const T* in = static_cast<const T*>(transposed ? params.dV : params.U);
  T* out = static_cast<T*>(transposed ? params.dU : params.V);
  const int s = blockIdx.x % pyramid.count, rows = rows_per_block(pyramid.rank);
  const int64_t begin = static_cast<int64_t>(blockIdx.x / pyramid.count) * rows;
  const int count = static_cast<int>(smaller<int64_t>(rows, params.rows - begin));
  const Block block = find_block(pyramid, [&](const Block& b) { return b.s == s; });
  switch (block.k) {
    case 2: return apply_fixed<2>(params, block, begin, count, in, out, transposed);
    case 4: return apply_fixed<4>(params, block, begin, count, in, out, transposed);
    case 6: return apply_fixed<6>(params, block, begin, count, in, out, transposed);
    case 8: return apply_fixed<8>(params, block, begin, count, in, out, transposed);
    default: return apply_any(params, block, begin, count, in, out, transposed);
  }
}

struct GradShared {
  bool own[kThreads];
};

// A block sums one group's rows in one span; a thread takes one entry (s, a, q) of the folded kernels.
template <typename T>
__global__ void __launch_bounds__(kThreads) core_grad_kernel(const __grid_constant__ CoreParams params) {
  EPT_SHARED(GradShared, shared);
  const Pyramid& pyramid = params.pyramid;
  const int64_t span = blockIdx.x % params.spans, part = blockIdx.x / params.spans;
  const int64_t group = part % params.groups;
  const int64_t entry = part / params.groups * kThreads + threadIdx.x;
  const bool exists = entry < pyramid.folded;
  const Block block = find_block(pyramid, [&](const Block& b) {
    return entry < b.offset + static_cast<int64_t>(b.k) * b.k;
  });
  const int k = block.k, a = static_cast<int>(entry - block.offset) / k, q = static_cast<int>(entry - block.offset) % k;
  const bool wanted = exists && (params.active == nullptr || params.active[group * pyramid.count + block.s]);
  const T* U = static_cast<const T*>(params.U) + block.column + q;
  const T* dV = static_cast<const T*>(params.dV) + block.column + a;

  float sum = 0.0f;
  const int64_t end = smaller((span + 1) * params.rows_per_span, params.rows);
  for (int64_t begin = span * params.rows_per_span; begin < end; begin += kThreads) {
    const int64_t row = begin + threadIdx.x;
    const bool own = row < end && group_of(params, row) == group;
    shared.own[threadIdx.x] = own;
    if (!__syncthreads_or(own)) continue;  // few rows of many are a group's
    const int count = static_cast<int>(smaller<int64_t>(kThreads, end - begin));
    for (int i = 0; wanted && i < count; ++i) {
      if (!shared.own[i]) continue;
      const int64_t place = (begin + i) * pyramid.columns;
#pragma unroll 4
      for (int p = 0; p < pyramid.rank; ++p) {
        sum += to_float(dV[place + static_cast<int64_t>(p) * k]) * to_float(U[place + static_cast<int64_t>(p) * k]);
      }
    }
    __syncthreads();  // the next rows' flags replace these
  }
  if (!exists) return;
  float* out = params.spans == 1 ? params.grad_folded : params.partial + span * params.groups * pyramid.folded;
  out[group * pyramid.folded + entry] = sum;
}

constexpr int kSumWarps = 8;

struct SumShared {
  float part[kSumWarps][kWarp];
};

// The sum over spans of 32 neighbouring entries: a warp adds every eighth, the first warp what the others have.
__global__ void __launch_bounds__(kSumWarps* kWarp) core_sum_kernel(const __grid_constant__ CoreParams params) {
  EPT_SHARED(SumShared, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t entries = params.groups * params.pyramid.folded;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  for (int64_t span = warp; entry < entries && span < params.spans; span += kSumWarps) {
    sum += params.partial[span * entries + entry];
  }
  shared.part[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || entry >= entries) return;
  float total = 0.0f;
  for (int w = 0; w < kSumWarps; ++w) total += shared.part[w][lane];
  params.grad_folded[entry] = total;
}

}  // namespace
}  // namespace ept::cuda

int ept_core(const ept::cuda::CoreParams* params, void* stream) {
  using namespace ept::cuda;
  const Pyramid& pyramid = params->pyramid;
  const int sides = (params->V != nullptr) + (params->dU != nullptr);
  if (sides > 0) {
    const auto kernel = by_dtype(params->dtype, core_kernel<float>, core_kernel<__half>, core_kernel<__nv_bfloat16>);
    const int64_t blocks = ceil_div<int64_t>(params->rows, rows_per_block(pyramid.rank)) * pyramid.count;
    const int error = launch(kernel, blocks, sides, kThreads, stream, *params);
    if (error != cudaSuccess) return error;
  }
  if (params->grad_folded == nullptr) return cudaSuccess;
  const auto kernel =
      by_dtype(params->dtype, core_grad_kernel<float>, core_grad_kernel<__half>, core_grad_kernel<__nv_bfloat16>);
  const int64_t parts = params->groups * ceil_div<int64_t>(pyramid.folded, kThreads);
  const int error = launch(kernel, parts * params->spans, 1, kThreads, stream, *params);
  if (error != cudaSuccess || params->spans == 1) return error;
  const int64_t entries = params->groups * pyramid.folded;
  return launch(core_sum_kernel, ceil_div<int64_t>(entries, kWarp), 1, kSumWarps * kWarp, stream, *params);
}
