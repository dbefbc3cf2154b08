// The CPU backend as C++ sees it: strips, threads, instruction sets and memory are this library's affair.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace ept {

// One call: sizes, adapter and rows. Row-major fp32 and contiguous unless said otherwise.
struct Problem {
    int64_t in_features, out_features, rank;
    std::vector<int64_t> scales;  // ascending
    DType dtype;                  // of x, grad, y and grad_x
    Rows x;                       // [rows, in]
    int64_t rows;
    const float* A;       // [rank, ceil(in / k_min)]
    const float* B;       // [ceil(out / k_min), rank]
    const float* folded;  // [groups, sum of k * k]
    int64_t num_groups;
    const int64_t* groups;  // [segments], null: kernel 0 everywhere
    int64_t segments;       // divides rows
    const unsigned char* active;  // [groups, scales]: 0 where a kernel is zero and its gradient, zero, too; null: 1
};

// y[t] = start, or what is there, plus the update of row t. Throws std::out_of_range if an entry of `groups` is none.
void forward(const Problem& problem, const MutableRows& y);

// Gradients of x, A, B and folded from that of y; null: not wanted. Those of A, B and folded are overwritten.
void backward(const Problem& problem, const Rows& grad, const MutableRows& grad_x, float* grad_A, float* grad_B,
              float* grad_folded);

// Instruction sets in this build that this processor has, best first.
std::vector<std::string> instruction_sets();
// Instruction sets in this build.
std::vector<std::string> compiled_instruction_sets();
// Uses one of them, or the best for an empty name. Throws std::invalid_argument for a name that is not among them.
void select_instruction_set(const std::string& name);
std::string selected_instruction_set();

}  // namespace ept
