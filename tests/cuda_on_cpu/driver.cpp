// Runs the kernels outside Python, where sanitizers work: driver INPUT OUTPUT reads calls from one file and writes every
// result to the other. Each array is an allocation of exactly its size, filled with NaN before a kernel writes it. The
// format is written and read by harness.py.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "pyramid.h"

namespace {

using namespace ept::cuda;

std::ifstream input;
std::ofstream output;

using Bytes = std::unique_ptr<char[]>;

Bytes read(size_t bytes) {
  Bytes data(new char[bytes]);
  input.read(data.get(), static_cast<std::streamsize>(bytes));
  if (!input) {
    std::fprintf(stderr, "driver: the input ends early\n");
    std::exit(2);
  }
  return data;
}

int64_t read_int() {
  int64_t value;
  std::memcpy(&value, read(sizeof value).get(), sizeof value);
  return value;
}

Bytes junk(size_t bytes) {
  Bytes data(new char[bytes]);
  for (size_t i = 0; i < bytes; ++i) data[i] = i % 2 ? 0x7f : static_cast<char>(0xff);  // a NaN of any dtype
  return data;
}

void write(const Bytes& data, size_t bytes) { output.write(data.get(), static_cast<std::streamsize>(bytes)); }

class Scratch final : public Allocator {
 public:
  void* allocate(size_t bytes) override {
    held_.push_back(junk(bytes));
    return held_.back().get();
  }

 private:
  std::vector<Bytes> held_;
};

float* floats(const Bytes& data) { return reinterpret_cast<float*>(data.get()); }

void run_call() {
  Problem problem{};
  problem.dtype = static_cast<Dtype>(read_int());
  problem.tensor_cores = read_int() != 0;
  const bool accumulate = read_int() != 0;
  problem.rows = read_int();
  problem.in_features = static_cast<int>(read_int());
  problem.out_features = static_cast<int>(read_int());
  const int64_t stride = read_int();  // of x
  const int64_t rank = read_int();
  std::vector<int64_t> scales(read_int());
  for (int64_t& k : scales) k = read_int();
  problem.pyramid = make_pyramid(rank, scales.data(), scales.size());
  const int64_t groups = read_int(), ids = read_int();  // ids: -1 for none
  const bool wide = read_int() != 0;

  const int64_t width = (problem.in_features + scales[0] - 1) / scales[0];
  const int64_t height = (problem.out_features + scales[0] - 1) / scales[0];
  const size_t element = problem.dtype == Dtype::kFloat32 ? 4 : 2;
  const size_t A_bytes = rank * width * 4, B_bytes = rank * height * 4, folded_bytes = groups * problem.pyramid.folded * 4;
  const size_t in_bytes = problem.rows * problem.in_features * element;
  const size_t out_bytes = problem.rows * problem.out_features * element;
  const size_t weight_size = static_cast<size_t>(problem.out_features) * problem.in_features;

  const Bytes A = read(A_bytes), B = read(B_bytes), folded = read(folded_bytes);
  const Bytes table = ids < 0 ? nullptr : read(ids * (wide ? 8 : 4));
  const int64_t last = problem.rows > 0 ? (problem.rows - 1) * stride + problem.in_features : 0;  // no padding at the end
  const Bytes x = read(last * element), grad = read(out_bytes);
  const Bytes y = accumulate ? read(out_bytes) : junk(out_bytes), grad_x = accumulate ? read(in_bytes) : junk(in_bytes);
  const Bytes base = read(weight_size * element), grad_weight = read(groups * weight_size * 4);
  const Bytes grad_A = junk(A_bytes), grad_B = junk(B_bytes), grad_folded = junk(folded_bytes);

  problem.A = right_factor(floats(A), width);
  problem.B = left_factor(floats(B), rank);
  problem.core = {floats(folded), {nullptr, wide, 1, groups}};
  if (ids > 0 && problem.rows > 0) {
    problem.core.groups.ids = table.get();
    problem.core.groups.rows_per_id = problem.rows / ids;
  }
  const Rows rows{x.get(), stride, problem.in_features};
  const Rows grad_rows{grad.get(), problem.out_features, problem.out_features};
  const Gradients gradients{grad_x.get(), accumulate, floats(grad_A), floats(grad_B), floats(grad_folded)};
  {
    Scratch scratch;
    delta_forward(problem, rows, y.get(), problem.out_features, accumulate, scratch, nullptr);
  }
  {
    Scratch scratch;
    delta_backward(problem, grad_rows, rows, gradients, scratch, nullptr);
  }
  write(y, out_bytes);
  write(grad_x, in_bytes);
  write(grad_A, A_bytes);
  write(grad_B, B_bytes);
  write(grad_folded, folded_bytes);

  const Bytes merged = junk(groups * weight_size * element);
  weight_forward(problem, base.get(), merged.get(), nullptr);
  write(merged, groups * weight_size * element);
  Problem exact = problem;
  exact.dtype = Dtype::kFloat32;
  const Bytes weight = junk(groups * weight_size * 4);
  weight_forward(exact, nullptr, weight.get(), nullptr);
  write(weight, groups * weight_size * 4);
  const Bytes weight_A = junk(A_bytes), weight_B = junk(B_bytes), weight_folded = junk(folded_bytes);
  const Gradients weight_gradients{nullptr, false, floats(weight_A), floats(weight_B), floats(weight_folded)};
  Scratch scratch;
  weight_backward(exact, floats(grad_weight), weight_gradients, scratch, nullptr);
  write(weight_A, A_bytes);
  write(weight_B, B_bytes);
  write(weight_folded, folded_bytes);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: driver INPUT OUTPUT\n");
    return 2;
  }
  input.open(argv[1], std::ios::binary);
  output.open(argv[2], std::ios::binary);
  for (int64_t calls = read_int(); calls > 0; --calls) run_call();
  output.flush();
  return output ? 0 : 2;
}
