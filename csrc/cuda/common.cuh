// Device helpers that every pass shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "params.h"

// A build that runs the kernels on a CPU defines its own, to see every access to shared memory.
#ifndef EPT_SHARED
#define EPT_SHARED(Type, name) __shared__ Type name
#endif

namespace ept::cuda {

constexpr int kWarp = 32;
constexpr int kRankBlock = 8;  // ranks that a SIMT thread holds in registers; more ranks take more rounds

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

template <typename Int>
__host__ __device__ inline Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

__device__ inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// The group named by entry `index` of the table.
__device__ inline int64_t group_at(const Groups& groups, int64_t index) {
  if (groups.ids == nullptr) return 0;
  const int64_t group = groups.wide ? static_cast<const int64_t*>(groups.ids)[index]
                                    : static_cast<const int32_t*>(groups.ids)[index];
  assert(group >= 0 && group < groups.count && "groups holds an index outside folded");
  return group;
}

__device__ inline int64_t group_of(const Groups& groups, int64_t row) {
  return groups.ids == nullptr ? 0 : group_at(groups, row / groups.rows_per_id);
}

// True for every thread of the block if Kbar_s of any group among the rows [begin, end) has a non-zero entry (or a NaN).
// Decided on the device, so that the host never waits for a router. Every thread of the block must call it.
__device__ inline bool scale_is_active(const Pyramid& pyramid, const Core& core, int s, int64_t begin, int64_t end) {
  const int entries = pyramid.k[s] * pyramid.k[s];
  const bool grouped = core.groups.ids != nullptr;
  const int64_t first = grouped ? begin / core.groups.rows_per_id : 0;
  const int64_t last = grouped ? (end - 1) / core.groups.rows_per_id : 0;
  bool any = false;
  int64_t previous = -1;
  for (int64_t index = first; index <= last; ++index) {
    const int64_t group = group_at(core.groups, index);
    if (group == previous) continue;
    previous = group;
    const float* kernel = core.folded + group * pyramid.folded + pyramid.offset[s];
    for (int i = threadIdx.x; i < entries; i += blockDim.x) any |= kernel[i] != 0.0f;
  }
  return __syncthreads_or(any) != 0;
}

// Bit s says whether scale s is active in the rows [begin, end).
__device__ inline uint32_t active_scales(const Pyramid& pyramid, const Core& core, int64_t begin, int64_t end) {
  uint32_t mask = 0;
  for (int s = 0; s < pyramid.count; ++s) {
    if (scale_is_active(pyramid, core, s, begin, end)) mask |= 1u << s;
  }
  return mask;
}

template <int K>
struct Scale {
  static constexpr int value = K;  // 0: known at run time only
};

// Calls f(Scale<k>) for the scales worth their own code, whose divisions become multiplications, else f(Scale<0>).
template <typename F>
__device__ inline void with_scale(int k, F&& f) {
  switch (k) {
    case 1: return f(Scale<1>{});
    case 2: return f(Scale<2>{});
    case 3: return f(Scale<3>{});
    case 4: return f(Scale<4>{});
    case 6: return f(Scale<6>{});
    case 8: return f(Scale<8>{});
    default: return f(Scale<0>{});
  }
}
constexpr int kLargestScale = 8;  // of those with their own code

// --- host -------------------------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("ept_kernels: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, cudaStream_t stream,
            const Params& params) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, params), name);
  check(cudaGetLastError(), name);
}

// Blocks along x: one for each of `count` pieces of work, as a grid dimension.
inline unsigned blocks(int64_t count, const char* name) {
  if (count > INT32_MAX) throw std::runtime_error(std::string("ept_kernels: ") + name + ": too many rows for one grid");
  return static_cast<unsigned>(count);
}

}  // namespace ept::cuda
