// What the host hands to the kernels, and the launchers of every pass. No torch here: the same declarations serve the
// binding, the C++ tests and the build that runs the kernels on a CPU.
//
//   U[t, p, q] = sum_j A[p, j] x[t, j k + q]        shrink, per scale k          U, V: [T, r sum(k)] fp32,
//   V[t, p, a] = sum_q U[t, p, q] Kbar[g(t), a, q]  core                         scale after scale
//   y[t, c]   += sum_p V[t, p, c % k] B[c / k, p]   expand
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace ept::cuda {

constexpr int kMaxScales = 32;  // distinct scales of a layer: one bit each in a mask of active scales

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// The layer's static sizes: scale s owns columns [column[s], column[s] + rank * k[s]) of a row of intermediates, laid
// out as [rank, k], and entries [offset[s], offset[s] + k[s]^2) of a group's folded kernels.
struct Pyramid {
  int rank;
  int count;
  int columns;  // rank * sum(k)
  int folded;   // sum(k^2)
  int k[kMaxScales];
  int column[kMaxScales];
  int offset[kMaxScales];
};

// T rows of `features` numbers with unit stride inside a row.
struct Rows {
  const void* data;
  int64_t stride;
  int features;
};

// A factor of the seed, read as f(p, j): A is [r, w] with strides (w, 1), B is [h, r] with strides (1, r).
struct Factor {
  const float* data;
  int64_t rank_stride;
  int64_t index_stride;
};

// ids[t / rows_per_id] is the group of row t, one of `count`; without ids every row belongs to group 0.
struct Groups {
  const void* ids;
  bool wide;  // int64 rather than int32
  int64_t rows_per_id;
  int64_t count;
};

// Folded kernels [groups, pyramid.folded] and who uses them.
struct Core {
  const float* folded;
  Groups groups;
};

// Scratch memory that lives until the work enqueued by the current call has run.
class Allocator {
 public:
  virtual ~Allocator() = default;
  virtual void* allocate(size_t bytes) = 0;
};

// --- one call of an op ------------------------------------------------------------------------------------------------

struct Problem {
  Pyramid pyramid;
  Dtype dtype;  // of x, y and their gradients; everything else is fp32
  int64_t rows;
  int in_features;
  int out_features;
  Factor A;
  Factor B;
  Core core;
  bool tensor_cores;  // use them for half rows; they need sm_80
};

// y[t] (+)= sum_k B_k (A_k X_t) Kbar_k[g(t)]^T. y is overwritten unless `accumulate`.
void delta_forward(const Problem& problem, const Rows& x, void* y, int64_t y_stride, bool accumulate,
                   Allocator& scratch, cudaStream_t stream);

// What backward writes; null where nobody asks. x is contiguous and overwritten unless `accumulate_x`.
struct Gradients {
  void* x;
  bool accumulate_x;
  float* A;       // [r, ceil(in / k_min)]
  float* B;       // [ceil(out / k_min), r]
  float* folded;  // [groups, pyramid.folded]
};

void delta_backward(const Problem& problem, const Rows& grad, const Rows& x, const Gradients& gradients,
                    Allocator& scratch, cudaStream_t stream);

// out[g] = (base +) sum_k crop((B_k A_k) kron Kbar_k[g]), [groups, out, in] in `dtype`; base [out, in] or null.
// Of `problem`, rows and core.groups.ids are not read.
void weight_forward(const Problem& problem, const void* base, void* out, cudaStream_t stream);

// The adjoint of weight_forward without base: grad [groups, out, in] fp32; gradients.x is not read.
void weight_backward(const Problem& problem, const float* grad, const Gradients& gradients, Allocator& scratch,
                     cudaStream_t stream);

// --- one pass, one launch ---------------------------------------------------------------------------------------------

struct ShrinkParams {
  Pyramid pyramid;
  Rows x;
  int64_t rows;
  Factor factor;      // read by the SIMT kernel
  const void* dense;  // Ahat of interleave(), read by the tensor-core kernel
  int64_t dense_stride;
  Core core;
  bool transposed;  // backward: out = U Kbar instead of U Kbar^T
  bool all_scales;  // also those whose folded kernels are zero in every group at hand
  float* U;         // [T, columns]; undefined where a scale is skipped
  float* V;         // [T, columns] or null; zero where a scale is skipped
};
void shrink(const ShrinkParams& params, Dtype dtype, cudaStream_t stream);
void shrink_tensor_cores(const ShrinkParams& params, Dtype dtype, cudaStream_t stream);

struct ExpandParams {
  Pyramid pyramid;
  int64_t rows;
  const float* V;  // [T, columns]
  Factor factor;
  const void* dense;
  int64_t dense_stride;
  Core core;  // a scale whose folded kernels are zero in every group at hand is skipped
  void* y;
  int64_t y_stride;
  int features;
  bool accumulate;
};
void expand(const ExpandParams& params, Dtype dtype, cudaStream_t stream);
void expand_tensor_cores(const ExpandParams& params, Dtype dtype, cudaStream_t stream);

// partial[chunk, s, p, c] = sum over the chunk's rows of V[t, p, c % k] x[t, c]
struct FactorGradParams {
  Pyramid pyramid;
  Rows x;
  int64_t rows;
  int64_t rows_per_chunk;
  int chunks;
  const float* V;
  Core core;
  float* partial;  // [chunks, scales, rank, features]
};
void factor_grad(const FactorGradParams& params, Dtype dtype, cudaStream_t stream);
void factor_grad_tensor_cores(const FactorGradParams& params, Dtype dtype, cudaStream_t stream);

// out(p, j) = sum over chunks, scales with j < ceil(features / k), and q of partial[chunk, s, p, j k + q]
struct FactorReduceParams {
  Pyramid pyramid;
  int features;
  int chunks;
  const float* partial;
  float* out;
  int64_t rank_stride;
  int64_t index_stride;
  int size;  // number of j
};
void factor_reduce(const FactorReduceParams& params, cudaStream_t stream);

// partial[slice, g, f] = sum over the slice's rows of group g, and p, of dV[t, p, a] U[t, p, q]; f = offset + a k + q
struct CoreGradParams {
  Pyramid pyramid;
  int64_t rows;
  int64_t rows_per_slice;
  int slices;
  Groups groups;
  const float* U;
  const float* dV;
  float* partial;  // [slices, groups, folded]
  float* out;      // [groups, folded]
};
void core_grad(const CoreGradParams& params, cudaStream_t stream);
void core_reduce(const CoreGradParams& params, cudaStream_t stream);

// dense[(s, p, q), c] = f(p, c / k) if c % k == q and c < features, else 0: [columns, stride] in `dtype`
struct InterleaveParams {
  Pyramid pyramid;
  Factor factor;
  int features;
  void* dense;
  int64_t stride;
};
void interleave(const InterleaveParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace ept::cuda
