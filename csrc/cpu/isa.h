// The kernels of one instruction set: included by the file that names it (EPT_ISA), the floats in its vectors (EPT_WIDTH)
// and the ranks that its registers hold for three rows (EPT_RANKS).
#pragma once

#include "pack.h"
#include "passes.h"

namespace ept::EPT_ISA {

static int64_t forward_scratch(const Forward& call) {
    const Layer& layer = *call.layer;
    const int64_t output = call.dtype == DType::bf16 ? Output<bf16>::scratch(layer.out, block_rows(layer)) : 0;
    return 2 * intermediate_floats(layer) + output;
}

static int64_t backward_scratch(const Backward& call) {
    const Layer& layer = *call.layer;
    const int64_t output = call.dtype == DType::bf16 ? Output<bf16>::scratch(layer.in, block_rows(layer)) : 0;
    return 5 * intermediate_floats(layer) + output;
}

static void forward(const Forward& call, int64_t begin, int64_t end, float* scratch) {
    if (call.dtype == DType::bf16) forward_rows<bf16>(call, begin, end, scratch);
    else forward_rows<float>(call, begin, end, scratch);
}

static void backward(const Backward& call, int64_t begin, int64_t end, const Partial& partial, float* scratch) {
    if (call.dtype == DType::bf16) backward_rows<bf16>(call, begin, end, partial, scratch);
    else backward_rows<float>(call, begin, end, partial, scratch);
}

#define EPT_STRING_(x) #x
#define EPT_STRING(x) EPT_STRING_(x)

extern const Kernels kernels;
const Kernels kernels = {EPT_STRING(EPT_ISA), W,        block_rows,  forward_scratch, backward_scratch,
                         forward,             backward, takes_pairs, pack,            unpack};

}  // namespace ept::EPT_ISA
