// From task embeddings to folded kernels, and back: the router's top-k, its softmax, and the sum of the selected experts.
// A few thousand multiply-adds, for which a dozen tensor operations would cost more than the layer that they serve.
#pragma once

#include <cstdint>
#include <vector>

namespace ept {

using std::int64_t;

struct Expert {
    int64_t k;       // its kernel is [k, k]
    int64_t scale;   // which of the layer's scales that is
    int64_t folded;  // floats of a folded kernel before that scale
    float factor;    // alpha / r times the scale's ALP factor
};

// Row-major fp32, contiguous.
struct Router {
    std::vector<Expert> experts;
    int64_t num_scales;
    int64_t folded_size;
    int64_t top_k;
    int64_t width;         // of a task embedding
    const float* gate;     // [experts, width]
    const float* table;    // [tasks, width]
    int64_t num_tasks;
    int64_t groups;
    const int64_t* tasks;  // [groups] rows of the table; null: consecutive ones from first_task on
    int64_t first_task;
    std::vector<const float*> kernels;  // of each expert
};

// Fills folded [groups, folded_size] and active [groups, num_scales]. A task's experts are those of its highest logits,
// the best first, ties to the lower index. Throws std::out_of_range for a task that the table lacks.
void fold_tasks(const Router& router, float* folded, unsigned char* active);

// Gradients of gate, table and kernels from that of `folded`; null: not wanted. All are overwritten.
void fold_tasks_backward(const Router& router, const float* grad_folded, float* grad_gate, float* grad_table,
                         const std::vector<float*>& grad_kernels);

}  // namespace ept
