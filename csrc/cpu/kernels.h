// What an instruction set provides: the passes over a range of rows, and the packing around them. Plain data in and out,
// so that files compiled for different instruction sets share nothing but these declarations.
#pragma once

#include "layout.h"

namespace ept {

enum class DType { f32, bf16 };

// Rows of a matrix with unit stride inside a row.
struct Rows {
    const void* data;
    int64_t stride;
};

struct MutableRows {
    void* data;
    int64_t stride;
    bool accumulate;   // add to what is there; else start from `start`
    const void* start; // one row, or null for zeros
};

// Folded kernels, one for each group, and which rows use them.
struct Cores {
    const float* columns;         // [groups][core]: entry (q, lane of a) is Kbar[a, q]
    const float* rows;            // [groups][core]: entry (a, lane of q) is Kbar[a, q]
    const unsigned char* active;  // [groups][num_scales]: whether a kernel has an entry that is not zero
    const unsigned char* wanted;  // [groups][num_scales]: whether its gradient is wanted, where any is
    const int64_t* groups;        // [segments], null: all rows use kernel 0
    int64_t segment;              // rows of one segment
};

// A factor repeated along the lanes, as floats or as pairs of bf16, for the pass that reduces over vectors (shrink) and
// for the one that reduces over ranks (expand). Floats serve both; pairs are made from a plain copy.
struct Packed {
    void* shrink;
    void* expand;
    void* plain;
};

struct Forward {
    const Layer* layer;
    DType dtype;
    Rows x;
    MutableRows y;
    Packed A, B;
    Cores cores;
};

struct Backward {
    const Layer* layer;
    DType dtype;
    Rows grad, x;
    MutableRows grad_x;  // null data: not wanted
    Packed A, B;
    Cores cores;
    bool need_A, need_B, need_core;  // need_core: of the kernels that are `wanted`
};

// Sums over the rows of one task, in the layouts of the packed factors and of the repeated cores. Zero at first.
struct Partial {
    float* A;
    float* B;
    float* core;  // [groups][core]: entry (q, lane of a) is the gradient of Kbar[a, q]
};

struct Kernels {
    const char* name;
    int width;  // floats in a vector
    int64_t (*block_rows)(const Layer&);
    int64_t (*forward_scratch)(const Forward&);    // floats of scratch that one task needs
    int64_t (*backward_scratch)(const Backward&);
    void (*forward)(const Forward&, int64_t begin, int64_t end, float* scratch);
    void (*backward)(const Backward&, int64_t begin, int64_t end, const Partial&, float* scratch);
    // Whether rows of this dtype take factors as pairs: the three buffers of Packed differ then.
    bool (*takes_pairs)(DType);
    // factor[p * rank_stride + j] -> packed, one strip of it. Reads up to a vector beyond the last j of a rank.
    void (*pack)(const Layer&, const Side&, int strip, DType, const float* factor, int64_t rank_stride, const Packed&);
    // the adjoint for one strip and rank: adds the sum of the parts, in their order, to grad[j]
    void (*unpack)(const Layer&, const Side&, int strip, int64_t rank, const float* const* parts, int count, float* grad);
};

}  // namespace ept
