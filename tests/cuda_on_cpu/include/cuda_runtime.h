// A stand-in for the CUDA runtime that lets g++ compile the kernels of csrc/cuda and a CPU execute them.
//
// Blocks run on OS threads, several at a time and one block a thread; the CUDA threads of a block are fibers of that
// OS thread, which yield at barriers and warp operations only (runtime.cpp). Shared memory holds junk when a block
// starts. Under ThreadSanitizer every fiber counts as a thread and only barriers order them, so a missing barrier or a
// write by two blocks is reported. Weak memory, bank conflicts and asynchronous copies are not modelled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

struct Coordinates {
  dim3 thread, block, block_dim, grid_dim;
};

const Coordinates& coordinates();  // of the running fiber

template <dim3 Coordinates::*Which, unsigned dim3::*Axis>
struct Component {
  operator unsigned() const { return coordinates().*Which.*Axis; }
};

template <dim3 Coordinates::*Which>
struct Vector {
  Component<Which, &dim3::x> x{};
  Component<Which, &dim3::y> y{};
  Component<Which, &dim3::z> z{};
};

void run(dim3 grid, dim3 block, const std::function<void()>& kernel);
void* shared_memory(const void* key, size_t bytes, size_t alignment);
void block_barrier();
bool block_barrier_or(bool value);
float shuffle_down(unsigned mask, float value, unsigned distance);

}  // namespace shim

inline constexpr shim::Vector<&shim::Coordinates::thread> threadIdx{};
inline constexpr shim::Vector<&shim::Coordinates::block> blockIdx{};
inline constexpr shim::Vector<&shim::Coordinates::block_dim> blockDim{};
inline constexpr shim::Vector<&shim::Coordinates::grid_dim> gridDim{};

#define EPT_SHARED(Type, name) \
  static const char name##_key = 0; \
  Type& name = *static_cast<Type*>(::shim::shared_memory(&name##_key, sizeof(Type), alignof(Type)))

inline void __syncthreads() { shim::block_barrier(); }
inline int __syncthreads_or(int value) { return shim::block_barrier_or(value != 0); }
inline float __shfl_down_sync(unsigned mask, float value, unsigned distance) {
  return shim::shuffle_down(mask, value, distance);
}

// --- host API ---------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidConfiguration";
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool valid = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= INT32_MAX && grid.y <= 65535 &&
                     grid.z <= 65535 && block.x > 0 && block.x * block.y * block.z <= 1024;
  if (!valid) return cudaErrorInvalidConfiguration;
  shim::run(grid, block, [&] { kernel(params); });
  return cudaSuccess;
}
