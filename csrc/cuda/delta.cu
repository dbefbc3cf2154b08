// Which passes make up a forward and a backward call, and the scratch memory between them. No kernels here.

#include "common.cuh"

namespace ept::cuda {
namespace {

constexpr int64_t kDenseTile = 128;  // rows of a dense factor are padded to this many features
constexpr int64_t kBlocksWanted = 512;  // enough to fill a large GPU, so that a sum over rows is split no finer

float* floats(Allocator& scratch, int64_t count) {
  return static_cast<float*>(scratch.allocate(static_cast<size_t>(count) * sizeof(float)));
}

struct Dense {
  const void* data = nullptr;
  int64_t stride = 0;
};

bool uses_tensor_cores(const Problem& problem) { return problem.tensor_cores && problem.dtype != Dtype::kFloat32; }

// The factor as one matrix of all scales, where the tensor cores want it.
Dense dense_factor(const Problem& problem, const Factor& factor, int features, Allocator& scratch,
                   cudaStream_t stream) {
  if (!uses_tensor_cores(problem)) return {};
  const int64_t stride = ceil_div<int64_t>(features, kDenseTile) * kDenseTile;
  void* dense = scratch.allocate(static_cast<size_t>(stride * problem.pyramid.columns) * 2);
  interleave({problem.pyramid, factor, features, dense, stride}, problem.dtype, stream);
  return {dense, stride};
}

struct Shrunk {
  float* U;
  float* V;
};

Shrunk run_shrink(const Problem& problem, const Rows& x, const Factor& factor, const Dense& dense, bool transposed,
                  bool all_scales, bool with_core, Allocator& scratch, cudaStream_t stream) {
  const int64_t size = problem.rows * problem.pyramid.columns;
  const Shrunk out{floats(scratch, size), with_core ? floats(scratch, size) : nullptr};
  const ShrinkParams params{problem.pyramid, x,          problem.rows, factor,     dense.data, dense.stride,
                            problem.core,    transposed, all_scales,   out.U, out.V};
  (uses_tensor_cores(problem) ? shrink_tensor_cores : shrink)(params, problem.dtype, stream);
  return out;
}

void run_expand(const Problem& problem, const float* V, const Factor& factor, const Dense& dense, void* y,
                int64_t stride, int features, bool accumulate, cudaStream_t stream) {
  const ExpandParams params{problem.pyramid, problem.rows, V,      factor,   dense.data, dense.stride,
                            problem.core,    y,            stride, features, accumulate};
  (uses_tensor_cores(problem) ? expand_tensor_cores : expand)(params, problem.dtype, stream);
}

// d(factor)(p, j) = sum_k sum_{t, q} V[t, p, q] x[t, j k + q]; zeros without rows.
void run_factor_grad(const Problem& problem, const Rows& x, const float* V, float* out, int64_t rank_stride,
                     int64_t index_stride, Allocator& scratch, cudaStream_t stream) {
  constexpr int kFeatures = 64, kLeastRows = 64;
  const int64_t wanted = ceil_div<int64_t>(kBlocksWanted, ceil_div(x.features, kFeatures));
  const int64_t most = ceil_div<int64_t>(problem.rows, kLeastRows);
  const int64_t rows_per_chunk = most == 0 ? 1 : ceil_div(problem.rows, wanted < most ? wanted : most);
  const int chunks = static_cast<int>(ceil_div(problem.rows, rows_per_chunk));
  float* partial = nullptr;
  if (chunks > 0) {
    const int64_t size = static_cast<int64_t>(chunks) * problem.pyramid.count * problem.pyramid.rank * x.features;
    partial = floats(scratch, size);
    const FactorGradParams params{problem.pyramid, x, problem.rows, rows_per_chunk, chunks, V, problem.core, partial};
    (uses_tensor_cores(problem) ? factor_grad_tensor_cores : factor_grad)(params, problem.dtype, stream);
  }
  factor_reduce({problem.pyramid, x.features, chunks, partial, out, rank_stride, index_stride,
                 ceil_div(x.features, problem.pyramid.k[0])},
                stream);
}

// dKbar of every scale and group; zeros without rows.
void run_core_grad(const Problem& problem, const float* U, const float* dV, float* out, Allocator& scratch,
                   cudaStream_t stream) {
  constexpr int64_t kLeastRows = 32;
  const int64_t groups = problem.core.groups.count;
  if (groups == 0) return;
  const int64_t wanted = ceil_div(kBlocksWanted, groups), most = ceil_div(problem.rows, kLeastRows);
  const int64_t rows_per_slice = most == 0 ? 1 : ceil_div(problem.rows, wanted < most ? wanted : most);
  const int slices = static_cast<int>(ceil_div(problem.rows, rows_per_slice));
  float* partial = floats(scratch, slices * groups * problem.pyramid.folded);
  const CoreGradParams params{problem.pyramid, problem.rows, rows_per_slice, slices, problem.core.groups,
                              U,               dV,           partial,        out};
  if (slices > 0) core_grad(params, stream);
  core_reduce(params, stream);
}

}  // namespace

void delta_forward(const Problem& problem, const Rows& x, void* y, int64_t y_stride, bool accumulate,
                   Allocator& scratch, cudaStream_t stream) {
  if (problem.rows == 0) return;
  const Dense A = dense_factor(problem, problem.A, problem.in_features, scratch, stream);
  const Dense B = dense_factor(problem, problem.B, problem.out_features, scratch, stream);
  const float* V = run_shrink(problem, x, problem.A, A, false, false, true, scratch, stream).V;
  run_expand(problem, V, problem.B, B, y, y_stride, problem.out_features, accumulate, stream);
}

void delta_backward(const Problem& problem, const Rows& grad, const Rows& x, const Gradients& gradients,
                    Allocator& scratch, cudaStream_t stream) {
  const bool need_x = gradients.x != nullptr, need_A = gradients.A != nullptr;
  const bool need_B = gradients.B != nullptr, need_folded = gradients.folded != nullptr;
  Shrunk left{}, right{};  // U and V from x and A; dV and dU from grad and B
  Dense A;
  if (problem.rows > 0) {
    if (need_x || need_B || need_folded) {
      A = dense_factor(problem, problem.A, problem.in_features, scratch, stream);
    }
    if (need_B || need_folded) {
      left = run_shrink(problem, x, problem.A, A, false, need_folded, need_B, scratch, stream);
    }
    if (need_x || need_A || need_folded) {
      const Dense B = dense_factor(problem, problem.B, problem.out_features, scratch, stream);
      right = run_shrink(problem, grad, problem.B, B, true, need_folded, need_x || need_A, scratch, stream);
    }
    if (need_x) {
      run_expand(problem, right.V, problem.A, A, gradients.x, problem.in_features, problem.in_features,
                 gradients.accumulate_x, stream);
    }
  }
  if (need_folded) run_core_grad(problem, left.U, right.U, gradients.folded, scratch, stream);
  if (need_A) {
    const int64_t width = ceil_div(problem.in_features, problem.pyramid.k[0]);
    run_factor_grad(problem, x, right.V, gradients.A, width, 1, scratch, stream);
  }
  if (need_B) run_factor_grad(problem, grad, left.V, gradients.B, 1, problem.pyramid.rank, scratch, stream);
}

}  // namespace ept::cuda
