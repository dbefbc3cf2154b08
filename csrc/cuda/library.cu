// What the library says about itself.

#include "common.cuh"

namespace ept::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace
}  // namespace ept::cuda

const int32_t ept_sizes[] = {
    ept::cuda::kInterface,
    sizeof(ept::cuda::InterleaveParams),
    sizeof(ept::cuda::GatherParams),
    sizeof(ept::cuda::CoreParams),
    sizeof(ept::cuda::DropoutParams),
    sizeof(ept::cuda::FoldParams),
    sizeof(ept::cuda::FoldGradParams),
};

int ept_probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ept::cuda::probe_kernel);
}

const char* ept_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* ept_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#define EPT_TEXT_OF(...) #__VA_ARGS__
#define EPT_TEXT(...) EPT_TEXT_OF(__VA_ARGS__)

const char* ept_build_info() {
#if defined(__CUDA_ARCH_LIST__)
  return EPT_TEXT(__CUDA_ARCH_LIST__) ";nvcc " EPT_TEXT(__CUDACC_VER_MAJOR__) "." EPT_TEXT(__CUDACC_VER_MINOR__);
#else
  return ";no nvcc";
#endif
}
