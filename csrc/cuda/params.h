// The C interface of the library: one struct a pass, filled by ept_kernels/backends/cuda_library.py, which mirrors every field.
// Addresses are those of contiguous tensors on the device that is current; nothing here knows Python or PyTorch.
//
// W = rank * sum(k) columns of intermediates, scale after scale, of each the ranks p, of each the slots q < k:
//   A_hat[(s, p, q), c] = A[p, c / k] if c % k == q else 0             interleave; B_hat from B[o / k, p] likewise
//   V[t, (s, p, a)] = sum_q Kbar_s[g(t)][a, q] U[t, (s, p, q)]          core, between U = x A_hat^T and y = V B_hat
//   A[p, j] = sum_{s, q} A_hat[(s, p, q), j k + q]                      gather, the adjoint of interleave
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define EPT_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define EPT_EXPORT extern "C"
#endif

namespace ept::cuda {

// Goes up with every change of this file that leaves the sizes of the structs as they are.
constexpr int kInterface = 1;

constexpr int kInlineScales = 32;  // a layer with more keeps them in device memory
constexpr int kMostExperts = 64;   // of a fold: they are compared in pairs

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A layer's scales, ascending. A group's folded kernels [folded] hold a [k, k] block for each, back to back.
struct Pyramid {
  const int32_t* table;  // [count] where count > kInlineScales, else null
  int64_t columns;       // W = rank * sum(k)
  int64_t folded;        // sum(k^2)
  int32_t rank;
  int32_t count;
  int32_t k[kInlineScales];
};

struct InterleaveParams {
  Pyramid pyramid;
  const void* A;  // (p, j) at p * a_rank + j * a_index; B likewise
  int64_t a_rank;
  int64_t a_index;
  const void* B;
  int64_t b_rank;
  int64_t b_index;
  void* A_hat;  // [W, in]
  void* B_hat;  // [W, out]
  int32_t in_features;
  int32_t out_features;
  int32_t factor_dtype;
  int32_t dtype;
};

struct GatherParams {
  Pyramid pyramid;
  const void* A_hat;  // gradients [W, in] and [W, out]; null: not wanted
  const void* B_hat;
  float* A;  // [rank, width]
  float* B;  // [height, rank]
  int32_t in_features;
  int32_t out_features;
  int32_t width;
  int32_t height;
  int32_t a_dtype;
  int32_t b_dtype;
};

// ids[t / rows_per_id] is the group of row t, one of `groups`; without ids every row belongs to group 0.
struct CoreParams {
  Pyramid pyramid;
  const void* ids;
  int64_t rows_per_id;
  int64_t groups;
  const float* folded;    // [groups, pyramid.folded]
  const uint8_t* active;  // [groups, scales]: 0 where a kernel is known to be zero; or null
  int64_t rows;
  const void* U;  // all of them [rows, W]
  void* V;        // Kbar U, null: not wanted
  const void* dV;
  void* dU;            // Kbar^T dV, null: not wanted
  float* grad_folded;  // [groups, pyramid.folded], null: not wanted
  float* partial;      // [spans, groups, pyramid.folded], scratch; not read where there is one span
  int64_t spans;
  int64_t rows_per_span;
  int32_t wide_ids;  // int64 rather than int32
  int32_t dtype;     // of U, V, dV, dU
};

struct DropoutParams {
  const void* x;
  void* out;            // [rows, columns], rows out_stride apart
  const int64_t* seed;  // [1]
  int64_t rows;
  int64_t x_stride;
  int64_t out_stride;
  int32_t columns;
  uint32_t threshold;  // a random word below it drops its entry
  float factor;        // of entries that are kept
  int32_t accumulate;
  int32_t dtype;
};

// Of each expert: its scale k, which one of the layer's that is, the place of that scale's block in a group's folded
// kernels, and alpha / r times its ALP factor.
struct Experts {
  int64_t offset[kMostExperts];
  int32_t k[kMostExperts];
  int32_t scale[kMostExperts];
  float factor[kMostExperts];
  int32_t count;
};

// Group g is task tasks[g], or first_task + g without tasks.
struct FoldParams {
  Experts experts;
  const float* kernels[kMostExperts];  // of each expert [k, k]
  const float* gate;     // [experts, width]
  const float* table;    // [num_tasks, width]
  const int64_t* tasks;  // [groups] or null
  int64_t first_task;
  int64_t num_tasks;
  int64_t groups;
  int64_t folded_size;
  float* folded;       // [groups, folded_size]
  uint8_t* active;     // [groups, scales]
  float* gates;        // [groups, experts], -1 where not selected; or null
  float* probability;  // [groups, experts], the softmax over all experts; or null
  int32_t width;
  int32_t scales;
  int32_t top_k;
};

struct FoldGradParams {
  Experts experts;
  const float* kernels[kMostExperts];  // [k, k]
  const float* gate;
  const float* table;
  const int64_t* tasks;
  int64_t first_task;
  int64_t num_tasks;
  int64_t groups;
  int64_t folded_size;
  const float* grad;         // [groups, folded_size]
  const float* gates;        // what the forward pass kept
  const float* probability;  // [groups, experts] where one expert was selected, else null
  float* logits_grad;        // [groups, experts], scratch for the gradients of gate and table
  float* grad_kernels;       // [sum of k^2 over the experts], null: not wanted; so the other two
  float* grad_gate;          // [experts, width]
  float* grad_table;         // [num_tasks, width]
  int64_t numbers;           // sum of k^2 over the experts
  int32_t width;
};

}  // namespace ept::cuda

// Each enqueues its kernels on a stream of the current device and returns a cudaError_t.
EPT_EXPORT int ept_interleave(const ept::cuda::InterleaveParams* params, void* stream);
EPT_EXPORT int ept_gather(const ept::cuda::GatherParams* params, void* stream);
EPT_EXPORT int ept_core(const ept::cuda::CoreParams* params, void* stream);
EPT_EXPORT int ept_dropout(const ept::cuda::DropoutParams* params, void* stream);
EPT_EXPORT int ept_fold(const ept::cuda::FoldParams* params, void* stream);
EPT_EXPORT int ept_fold_grad(const ept::cuda::FoldGradParams* params, void* stream);

// kInterface and the sizes of the structs above in their order: what a caller compares before it calls anything.
extern "C" __attribute__((visibility("default"))) const int32_t ept_sizes[];
// A cudaError_t: success, or why the current device cannot run what this library holds.
EPT_EXPORT int ept_probe();
EPT_EXPORT const char* ept_error_name(int error);
EPT_EXPORT const char* ept_error_text(int error);
// Virtual architectures as nvcc counts them (800 is sm_80), then the compiler.
EPT_EXPORT const char* ept_build_info();
