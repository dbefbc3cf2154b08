// The router and the fold, from task embeddings to folded kernels: forward in one launch, backward in two. Few numbers
// and many steps: sums run in a fixed order, and a group's do not depend on how many groups there are.
//
//   logits[g, e] = sum_d gate[e, d] table[task_g, d]      gates[g] = softmax of the top_k logits, of equal ones the first
//   folded[g, f] = sum_e gates[g, e] factor[e] K_e[f]
//   slope[g, e]  = factor[e] sum_f grad[g, f] K_e[f]      logits_grad[g] = the softmax's gradient of slope[g]
//   grad_K_e     = factor[e] sum_g gates[g, e] grad[g]    grad_gate = logits_grad^T table[tasks]
//   grad_table[t] = sum_{g: task_g = t} logits_grad[g] gate

#include "common.cuh"

namespace ept::cuda {
namespace {

struct ForwardShared {
  float logit[kMostExperts];
  float power[kMostExperts];
  float weight[kMostExperts];
  bool selected[kMostExperts];
};

template <typename Params>
__device__ int64_t task_of(const Params& params, int64_t group) {
  return params.tasks == nullptr ? params.first_task + group : params.tasks[group];
}

template <typename Params>
__device__ bool is_known(const Params& params, int64_t task) {
  return task >= 0 && task < params.num_tasks;
}

// A block takes a group. One whose task does not exist has NaN for logits.
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldParams params) {
  EPT_SHARED(ForwardShared, shared);
  const Experts& experts = params.experts;
  const int64_t group = blockIdx.x, task = task_of(params, group);
  const bool known = is_known(params, task);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own = threadIdx.x;

  for (int e = warp; e < experts.count; e += kThreads / kWarp) {
    const float* gate = params.gate + static_cast<int64_t>(e) * params.width;
    const float* line = params.table + (known ? task : 0) * params.width;
    float sum = known ? 0.0f : NAN;
    for (int d = lane; known && d < params.width; d += kWarp) sum += gate[d] * line[d];
    sum = warp_sum(sum);
    if (lane == 0) shared.logit[e] = sum;
  }
  __syncthreads();
  if (own < experts.count) {
    // NaN ranks above every number, so that it shows; fmaxf passes it over, but its power is NaN.
    const auto rank = [&](int e) { return std::isnan(shared.logit[e]) ? INFINITY : shared.logit[e]; };
    int before = 0;
    float highest = -INFINITY;
    for (int e = 0; e < experts.count; ++e) {
      highest = fmaxf(highest, shared.logit[e]);
      before += rank(e) > rank(own) || (rank(e) == rank(own) && e < own);
    }
    shared.selected[own] = before < params.top_k;
    shared.power[own] = expf(shared.logit[own] - highest);
  }
  __syncthreads();
  if (own < experts.count) {
    float chosen = 0.0f, all = 0.0f;
    for (int e = 0; e < experts.count; ++e) {
      all += shared.power[e];
      if (shared.selected[e]) chosen += shared.power[e];
    }
    const float gate = shared.power[own] / chosen;
    const int64_t place = group * experts.count + own;
    shared.weight[own] = gate * experts.factor[own];
    if (params.gates != nullptr) params.gates[place] = shared.selected[own] ? gate : -1.0f;
    if (params.probability != nullptr) params.probability[place] = shared.power[own] / all;
  }
  __syncthreads();
  for (int s = threadIdx.x; s < params.scales; s += kThreads) {
    bool used = false;
    for (int e = 0; e < experts.count; ++e) used |= shared.selected[e] && experts.scale[e] == s;
    params.active[group * params.scales + s] = used;
  }
  for (int64_t f = threadIdx.x; f < params.folded_size; f += kThreads) {
    float sum = 0.0f;
    for (int e = 0; e < experts.count; ++e) {
      const int64_t entry = f - experts.offset[e];
      if (shared.selected[e] && entry >= 0 && entry < static_cast<int64_t>(experts.k[e]) * experts.k[e]) {
        sum += shared.weight[e] * params.kernels[e][entry];
      }
    }
    params.folded[group * params.folded_size + f] = sum;
  }
}

struct BackwardShared {
  float slope[kMostExperts];
  float gate[kMostExperts];
  bool selected[kMostExperts];
};

// A block takes a group.
__global__ void __launch_bounds__(kThreads) logits_grad_kernel(const __grid_constant__ FoldGradParams params) {
  EPT_SHARED(BackwardShared, shared);
  const Experts& experts = params.experts;
  const int64_t group = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own = threadIdx.x;
  const float* gates = params.gates + group * experts.count;
  for (int e = warp; e < experts.count; e += kThreads / kWarp) {
    const bool selected = !(gates[e] < 0.0f);  // NaN is
    const float* grad = params.grad + group * params.folded_size + experts.offset[e];
    const int64_t entries = static_cast<int64_t>(experts.k[e]) * experts.k[e];
    float sum = 0.0f;
    for (int64_t f = lane; selected && f < entries; f += kWarp) sum += grad[f] * params.kernels[e][f];
    sum = warp_sum(sum);
    if (lane == 0) {
      shared.slope[e] = sum * experts.factor[e];
      shared.gate[e] = selected ? gates[e] : 0.0f;
      shared.selected[e] = selected;
    }
  }
  __syncthreads();
  if (own >= experts.count) return;
  const int64_t place = group * experts.count;
  float result = 0.0f;
  if (params.probability == nullptr) {
    // Sums of differences: a slope minus the mean of slopes would round to 0 where one gate is nearly 1.
    for (int e = 0; e < experts.count; ++e) result += shared.gate[e] * (shared.slope[own] - shared.slope[e]);
    result *= shared.gate[own];
  } else {
    // The value of the one gate is 1, its gradient that of the softmax over all experts.
    float pull = 0.0f, others = 0.0f;  // others: not 1 - share, for the same reason
    for (int e = 0; e < experts.count; ++e) {
      const float probability = params.probability[place + e];
      if (shared.selected[e]) {
        pull += shared.slope[e] * probability;
      } else {
        others += probability;
      }
    }
    result = pull * (shared.selected[own] ? others : -params.probability[place + own]);
  }
  params.logits_grad[place + own] = result;
}

// One number of one kernel: over the groups that selected its expert.
__device__ void sum_kernels(const FoldGradParams& params, int64_t number) {
  if (number >= params.numbers) return;
  const Experts& experts = params.experts;
  int64_t entry = number;
  int e = 0;
  for (;; ++e) {
    const int64_t entries = static_cast<int64_t>(experts.k[e]) * experts.k[e];
    if (entry < entries) break;
    entry -= entries;
  }
  float sum = 0.0f;
  for (int64_t group = 0; group < params.groups; ++group) {
    const float gate = params.gates[group * experts.count + e];
    if (!(gate < 0.0f)) sum += gate * params.grad[group * params.folded_size + experts.offset[e] + entry];
  }
  params.grad_kernels[number] = sum * experts.factor[e];
}

// One channel of one expert's line of the gate: over the groups.
__device__ void sum_gate(const FoldGradParams& params, int64_t index) {
  const Experts& experts = params.experts;
  const int64_t e = index / params.width, d = index % params.width;
  if (e >= experts.count) return;
  float sum = 0.0f;
  for (int64_t group = 0; group < params.groups; ++group) {
    const int64_t task = task_of(params, group);
    const float embedding = is_known(params, task) ? params.table[task * params.width + d] : 0.0f;
    sum += params.logits_grad[group * experts.count + e] * embedding;
  }
  params.grad_gate[index] = sum;
}

// One channel of one task's embedding: over the groups of the task and their experts.
__device__ void sum_table(const FoldGradParams& params, int64_t index) {
  const Experts& experts = params.experts;
  const int64_t task = index / params.width, d = index % params.width;
  if (task >= params.num_tasks) return;
  float sum = 0.0f;
  for (int64_t group = 0; group < params.groups; ++group) {
    if (task_of(params, group) != task) continue;
    for (int e = 0; e < experts.count; ++e) {
      sum += params.logits_grad[group * experts.count + e] * params.gate[static_cast<int64_t>(e) * params.width + d];
    }
  }
  params.grad_table[index] = sum;
}

struct Sections {
  int64_t kernels, gate, table;  // blocks
};

__host__ __device__ inline Sections sections_of(const FoldGradParams& params) {
  const auto blocks = [](const float* wanted, int64_t numbers) {
    return wanted == nullptr ? 0 : ceil_div<int64_t>(numbers, kThreads);
  };
  return {blocks(params.grad_kernels, params.numbers),
          blocks(params.grad_gate, static_cast<int64_t>(params.experts.count) * params.width),
          blocks(params.grad_table, params.num_tasks * params.width)};
}

__global__ void __launch_bounds__(kThreads) fold_grad_kernel(const __grid_constant__ FoldGradParams params) {
  const Sections sections = sections_of(params);
  int64_t block = blockIdx.x;
  if (block < sections.kernels) return sum_kernels(params, block * kThreads + threadIdx.x);
  block -= sections.kernels;
  if (block < sections.gate) return sum_gate(params, block * kThreads + threadIdx.x);
  sum_table(params, (block - sections.gate) * kThreads + threadIdx.x);
}

}  // namespace
}  // namespace ept::cuda

int ept_fold(const ept::cuda::FoldParams* params, void* stream) {
  using namespace ept::cuda;
  return launch(fold_kernel, params->groups, 1, kThreads, stream, *params);
}

int ept_fold_grad(const ept::cuda::FoldGradParams* params, void* stream) {
  using namespace ept::cuda;
  if (params->grad_gate != nullptr || params->grad_table != nullptr) {
    const int error = launch(logits_grad_kernel, params->groups, 1, kThreads, stream, *params);
    if (error != cudaSuccess) return error;
  }
  const Sections sections = sections_of(*params);
  return launch(fold_grad_kernel, sections.kernels + sections.gate + sections.table, 1, kThreads, stream, *params);
}
