// Helpers that every pass shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "params.h"

// A build that runs the kernels on a CPU defines its own, to see every access to shared memory.
#ifndef EPT_SHARED
#define EPT_SHARED(Type, name) __shared__ Type name
#endif

namespace ept::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

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

// Number `index` of an array whose type is known at run time only.
__device__ inline float load(const void* data, int dtype, int64_t index) {
  switch (dtype) {
    case kFloat16: return to_float(static_cast<const __half*>(data)[index]);
    case kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}

template <typename Int>
__host__ __device__ inline Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

template <typename Int>
__host__ __device__ inline Int smaller(Int a, Int b) { return a < b ? a : b; }

__device__ inline int scale_of(const Pyramid& pyramid, int s) {
  return pyramid.table == nullptr ? pyramid.k[s] : pyramid.table[s];
}

// A scale, its first column of intermediates and its first entry of folded kernels.
struct Block {
  int s = 0, k = 0;
  int64_t column = 0, offset = 0;
};

// The first block for which found(block) holds; with s = count if there is none.
template <typename F>
__device__ inline Block find_block(const Pyramid& pyramid, F&& found) {
  Block block;
  for (; block.s < pyramid.count; ++block.s) {
    block.k = scale_of(pyramid, block.s);
    if (found(block)) break;
    block.column += static_cast<int64_t>(pyramid.rank) * block.k;
    block.offset += static_cast<int64_t>(block.k) * block.k;
  }
  return block;
}

// The sum of `value` over a warp, in lane 0.
__device__ inline float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

// --- host -------------------------------------------------------------------------------------------------------------

// The kernel for a dtype.
template <typename Kernel>
Kernel by_dtype(int dtype, Kernel fp32, Kernel fp16, Kernel bf16) {
  return dtype == kFloat16 ? fp16 : dtype == kBFloat16 ? bf16 : fp32;
}

// A launch of blocks x sides; none where there is nothing to do.
template <typename Params>
int launch(void (*kernel)(Params), int64_t blocks, int sides, int threads, void* stream, const Params& params) {
  if (blocks <= 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), sides);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace ept::cuda
