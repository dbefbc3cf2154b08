// torch.ops.ept_cuda: checks, scratch memory, device and stream. Through PyTorch's stable ABI, so that one library serves
// every torch from 2.13 on, and builds with a CPU torch and nvcc. Host code only.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <tuple>
#include <vector>

#include "common.cuh"
#include "pyramid.h"

// The build that executes the kernels on a CPU takes its tensors there.
#ifndef EPT_DEVICE
#define EPT_DEVICE CUDA
#endif

namespace ept::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr auto kDevice = torch::headeronly::DeviceType::EPT_DEVICE;
constexpr int64_t kTensorCoreRows = 16;  // below one tile of rows the SIMT kernels have less to do

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "another dtype";
  }
}

std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "] of " << name_of(tensor.scalar_type());
  if (tensor.device().type() != kDevice) text << " on another type of device";
  return text.str();
}

[[noreturn]] void refuse(const char* name, const std::string& allowed, const Tensor& tensor) {
  throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " + describe(tensor));
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t d = 0; d < shape.size(); ++d) text << (d ? ", " : "") << shape[d];
  text << "]";
  return text.str();
}

// Shape first, then dtype and device: a shape is what a caller gets wrong.
void expect(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type,
            const Tensor& like) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) same = tensor.size(d) == shape[d];
  if (!same) refuse(name, shape_text(shape), tensor);
  if (tensor.scalar_type() != type) refuse(name, name_of(type), tensor);
  if (tensor.device().type() != kDevice) refuse(name, "on a CUDA device", tensor);
  if (tensor.get_device_index() != like.get_device_index()) {
    throw std::invalid_argument(std::string(name) + " must be on device " + std::to_string(like.get_device_index()) +
                                " as the first tensor, got device " + std::to_string(tensor.get_device_index()));
  }
}

void expect_contiguous(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type,
                       const Tensor& like) {
  expect(name, tensor, shape, type, like);
  if (!tensor.is_contiguous()) refuse(name, "contiguous", tensor);
}

// Rows [T, features] with unit stride inside a row.
Rows rows_of(const char* name, const Tensor& tensor, int64_t rows, int64_t features, const Tensor& like) {
  expect(name, tensor, {rows, features}, like.scalar_type(), like);
  if (features > 1 && tensor.stride(1) != 1) refuse(name, "contiguous inside a row", tensor);
  return {tensor.const_data_ptr(), tensor.stride(0), static_cast<int>(features)};
}

Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: refuse(name, "float32, float16 or bfloat16", tensor);
  }
}

int64_t tall(int64_t features, int64_t k) { return ceil_div(features, k); }

// Everything but the rows: geometry, A, B, folded.
Problem layer(const Tensor& A, const Tensor& B, const Tensor& folded, const std::vector<int64_t>& scales,
              int64_t in_features, int64_t out_features, const Tensor& like) {
  if (A.dim() != 2) refuse("A", "[r, ceil(in / k_min)]", A);
  if (in_features < 1 || in_features > INT_MAX / 2 || out_features < 1 || out_features > INT_MAX / 2) {
    throw std::invalid_argument("in_features and out_features must be 1 to 2^30, got " + std::to_string(in_features) +
                                " and " + std::to_string(out_features));
  }
  Problem problem{};
  problem.pyramid = make_pyramid(A.size(0), scales.data(), scales.size());
  const int64_t rank = A.size(0), width = tall(in_features, scales[0]), height = tall(out_features, scales[0]);
  expect_contiguous("A", A, {rank, width}, ScalarType::Float, like);
  expect_contiguous("B", B, {height, rank}, ScalarType::Float, like);
  if (folded.dim() != 2) refuse("folded", "[groups, sum(k^2)]", folded);
  expect_contiguous("folded", folded, {folded.size(0), problem.pyramid.folded}, ScalarType::Float, like);
  problem.in_features = static_cast<int>(in_features);
  problem.out_features = static_cast<int>(out_features);
  problem.A = right_factor(static_cast<const float*>(A.const_data_ptr()), width);
  problem.B = left_factor(static_cast<const float*>(B.const_data_ptr()), rank);
  problem.core = {static_cast<const float*>(folded.const_data_ptr()), {nullptr, false, 1, folded.size(0)}};
  return problem;
}

void add_rows(Problem& problem, const char* name, const Tensor& x, const std::optional<Tensor>& groups) {
  problem.rows = x.size(0);
  problem.dtype = dtype_of(name, x);
  if (!groups.has_value()) {
    if (problem.core.groups.count < 1) throw std::invalid_argument("folded must hold a group where groups is None");
  } else {
    if (groups->dim() != 1) refuse("groups", "[N]", *groups);
    const bool wide = groups->scalar_type() == ScalarType::Long;
    expect_contiguous("groups", *groups, {groups->size(0)}, wide ? ScalarType::Long : ScalarType::Int, x);
    const int64_t count = groups->size(0);
    if (count == 0 ? problem.rows != 0 : problem.rows % count != 0) {
      refuse("groups", "of a length that divides the " + std::to_string(problem.rows) + " rows", *groups);
    }
    if (count > 0 && problem.rows > 0) {
      problem.core.groups = {groups->const_data_ptr(), wide, problem.rows / count, problem.core.groups.count};
    }
  }
  int capability = 0;
  check(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, x.get_device_index()),
        "the device's capability");
  problem.tensor_cores = capability >= 8 && problem.rows >= kTensorCoreRows;
}

// The device of a tensor as the current one, and its current stream.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  torch::stable::accelerator::Stream stream;

  explicit Device(const Tensor& tensor)
      : guard(tensor.get_device_index()),
        stream(torch::stable::accelerator::getCurrentStream(tensor.get_device_index())) {}

  cudaStream_t handle() const { return static_cast<cudaStream_t>(stream.nativeHandle()); }
};

// torch's caching allocator: a block that is freed while the stream still uses it goes to later work of that stream.
class TorchAllocator final : public Allocator {
 public:
  explicit TorchAllocator(const Tensor& like) : like_(like) {}

  void* allocate(size_t bytes) override {
    const int64_t floats = static_cast<int64_t>((bytes + sizeof(float) - 1) / sizeof(float));
    tensors_.push_back(torch::stable::new_empty(like_, {&floats, 1}, ScalarType::Float));
    return tensors_.back().mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

// A gradient like `tensor`, or an empty tensor where it is not asked for.
Tensor gradient_of(const Tensor& tensor, bool needed) {
  const int64_t none = 0;
  return needed ? torch::stable::empty_like(tensor) : torch::stable::new_empty(tensor, {&none, 1});
}

float* data_of(Tensor& tensor, bool needed) { return needed ? static_cast<float*>(tensor.mutable_data_ptr()) : nullptr; }

void delta_(Tensor y, Tensor x, Tensor A, Tensor B, Tensor folded, std::optional<Tensor> groups,
            std::vector<int64_t> scales, bool accumulate) {
  if (x.dim() != 2) refuse("x", "[T, in]", x);
  if (y.dim() != 2) refuse("y", "[T, out]", y);
  Problem problem = layer(A, B, folded, scales, x.size(1), y.size(1), x);
  const Rows rows = rows_of("x", x, x.size(0), x.size(1), x);
  rows_of("y", y, x.size(0), y.size(1), x);
  add_rows(problem, "x", x, groups);
  if (problem.rows == 0) return;
  const Device device(x);
  TorchAllocator scratch(x);
  delta_forward(problem, rows, y.mutable_data_ptr(), y.stride(0), accumulate, scratch, device.handle());
}

std::tuple<Tensor, Tensor, Tensor> delta_backward_(std::optional<Tensor> grad_x, Tensor grad, Tensor x, Tensor A,
                                                   Tensor B, Tensor folded, std::optional<Tensor> groups,
                                                   std::vector<int64_t> scales, bool accumulate, bool need_A,
                                                   bool need_B, bool need_folded) {
  if (x.dim() != 2) refuse("x", "[T, in]", x);
  if (grad.dim() != 2) refuse("grad", "[T, out]", grad);
  Problem problem = layer(A, B, folded, scales, x.size(1), grad.size(1), x);
  const Rows rows = rows_of("x", x, x.size(0), x.size(1), x);
  const Rows grad_rows = rows_of("grad", grad, x.size(0), grad.size(1), x);
  if (grad_x.has_value()) expect_contiguous("grad_x", *grad_x, {x.size(0), x.size(1)}, x.scalar_type(), x);
  add_rows(problem, "x", x, groups);
  const Device device(x);
  TorchAllocator scratch(x);
  Tensor grad_A = gradient_of(A, need_A), grad_B = gradient_of(B, need_B), grad_folded = gradient_of(folded, need_folded);
  const Gradients gradients{grad_x.has_value() ? grad_x->mutable_data_ptr() : nullptr, accumulate,
                            data_of(grad_A, need_A), data_of(grad_B, need_B), data_of(grad_folded, need_folded)};
  delta_backward(problem, grad_rows, rows, gradients, scratch, device.handle());
  return {grad_A, grad_B, grad_folded};
}

Tensor weight(Tensor A, Tensor B, Tensor folded, int64_t in_features, int64_t out_features,
              std::vector<int64_t> scales, std::optional<Tensor> base) {
  Problem problem = layer(A, B, folded, scales, in_features, out_features, A);
  const Tensor& like = base.has_value() ? *base : A;
  problem.dtype = dtype_of("base", like);
  if (base.has_value()) expect_contiguous("base", *base, {out_features, in_features}, base->scalar_type(), A);
  const Device device(A);
  const int64_t shape[] = {folded.size(0), out_features, in_features};
  Tensor out = torch::stable::new_empty(like, {shape, 3});
  weight_forward(problem, base.has_value() ? base->const_data_ptr() : nullptr, out.mutable_data_ptr(), device.handle());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> weight_backward_(Tensor grad, Tensor A, Tensor B, Tensor folded,
                                                    std::vector<int64_t> scales, bool need_A, bool need_B,
                                                    bool need_folded) {
  if (grad.dim() != 3) refuse("grad", "[groups, out, in]", grad);
  const Problem problem = layer(A, B, folded, scales, grad.size(2), grad.size(1), A);
  expect_contiguous("grad", grad, {folded.size(0), grad.size(1), grad.size(2)}, ScalarType::Float, A);
  const Device device(A);
  TorchAllocator scratch(A);
  Tensor grad_A = gradient_of(A, need_A), grad_B = gradient_of(B, need_B), grad_folded = gradient_of(folded, need_folded);
  const Gradients gradients{nullptr, false, data_of(grad_A, need_A), data_of(grad_B, need_B),
                            data_of(grad_folded, need_folded)};
  weight_backward(problem, static_cast<const float*>(grad.const_data_ptr()), gradients, scratch, device.handle());
  return {grad_A, grad_B, grad_folded};
}

}  // namespace
}  // namespace ept::cuda

STABLE_TORCH_LIBRARY(ept_cuda, library) {
  library.def(
      "delta_(Tensor(a!) y, Tensor x, Tensor A, Tensor B, Tensor folded, Tensor? groups, int[] scales, bool accumulate)"
      " -> ()");
  library.def(
      "delta_backward_(Tensor(a!)? grad_x, Tensor grad, Tensor x, Tensor A, Tensor B, Tensor folded, Tensor? groups,"
      " int[] scales, bool accumulate, bool need_A, bool need_B, bool need_folded) -> (Tensor, Tensor, Tensor)");
  library.def(
      "weight(Tensor A, Tensor B, Tensor folded, int in_features, int out_features, int[] scales, Tensor? base)"
      " -> Tensor");
  library.def(
      "weight_backward(Tensor grad, Tensor A, Tensor B, Tensor folded, int[] scales, bool need_A, bool need_B,"
      " bool need_folded) -> (Tensor, Tensor, Tensor)");
}

// Whatever the device, so that a tensor on another one meets our own message.
STABLE_TORCH_LIBRARY_IMPL(ept_cuda, CompositeExplicitAutograd, library) {
  library.impl("delta_", TORCH_BOX(&ept::cuda::delta_));
  library.impl("delta_backward_", TORCH_BOX(&ept::cuda::delta_backward_));
  library.impl("weight", TORCH_BOX(&ept::cuda::weight));
  library.impl("weight_backward", TORCH_BOX(&ept::cuda::weight_backward_));
}

#define EPT_TEXT_OF(...) #__VA_ARGS__
#define EPT_TEXT(...) EPT_TEXT_OF(__VA_ARGS__)

// What was compiled, by what: virtual architectures as nvcc counts them (800 is sm_80), then the compiler.
extern "C" const char* ept_cuda_build_info() {
#if defined(__CUDA_ARCH_LIST__)
  return EPT_TEXT(__CUDA_ARCH_LIST__) ";nvcc " EPT_TEXT(__CUDACC_VER_MAJOR__) "." EPT_TEXT(__CUDACC_VER_MINOR__);
#else
  return ";no nvcc";
#endif
}
