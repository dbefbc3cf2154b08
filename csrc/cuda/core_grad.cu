// dKbar[g, a, q] = sum over rows of group g, and p, of dV[t, p, a] U[t, p, q], in two stages without atomics:
// slices of rows, then the sum over slices in a fixed order. An inactive scale has a gradient, too.

#include "reduce.cuh"

namespace ept::cuda {
namespace {

constexpr int kThreads = 128;

// A block takes one slice and one group; a thread takes entries (s, a, q) of the folded kernels.
__global__ void __launch_bounds__(kThreads) core_grad_kernel(const __grid_constant__ CoreGradParams params) {
  const Pyramid& pyramid = params.pyramid;
  const int64_t group = blockIdx.x / params.slices, slice = blockIdx.x % params.slices;
  const int64_t begin = slice * params.rows_per_slice, end = min64(begin + params.rows_per_slice, params.rows);
  const bool grouped = params.groups.ids != nullptr;
  float* partial = params.partial + (slice * params.groups.count + group) * pyramid.folded;
  int s = 0;
  for (int entry = threadIdx.x; entry < pyramid.folded; entry += kThreads) {
    while (s + 1 < pyramid.count && entry >= pyramid.offset[s + 1]) ++s;
    const int k = pyramid.k[s], a = (entry - pyramid.offset[s]) / k, q = (entry - pyramid.offset[s]) % k;
    float sum = 0.0f;
    for (int64_t row = begin; row < end;) {  // run by run of rows that share an entry of the table
      const int64_t index = grouped ? row / params.groups.rows_per_id : 0;
      const int64_t run_end = grouped ? min64((index + 1) * params.groups.rows_per_id, end) : end;
      if (group_at(params.groups, index) == group) {
        for (; row < run_end; ++row) {
          const int64_t start = row * pyramid.columns + pyramid.column[s];
          for (int p = 0; p < pyramid.rank; ++p) sum += params.dV[start + p * k + a] * params.U[start + p * k + q];
        }
      }
      row = run_end;
    }
    partial[entry] = sum;
  }
}

__global__ void __launch_bounds__(kReduceThreads) core_reduce_kernel(const __grid_constant__ CoreGradParams params) {
  EPT_SHARED(ReduceShared, shared);
  const int64_t entries = params.groups.count * params.pyramid.folded;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool exists = entry < entries;
  const float total = sum_across_warps(exists ? params.slices : 0, shared,
                                       [&](int slice) { return params.partial[slice * entries + entry]; });
  if (exists && threadIdx.x < kWarp) params.out[entry] = total;
}

}  // namespace

void core_grad(const CoreGradParams& params, cudaStream_t stream) {
  launch("core_grad", core_grad_kernel, dim3(blocks(params.groups.count * params.slices, "core_grad")), kThreads, stream,
         params);
}

void core_reduce(const CoreGradParams& params, cudaStream_t stream) {
  const int64_t entries = params.groups.count * params.pyramid.folded;
  launch("core_reduce", core_reduce_kernel, dim3(blocks(ceil_div<int64_t>(entries, kWarp), "core_reduce")),
         kReduceThreads, stream, params);
}

}  // namespace ept::cuda
