// How a layer's tensors are cut into vectors, for vectors of any width: the one place that computes it.
//
// A scale k looks at a row as [ceil(features / k), k]: element c is column c % k of group c / k. A strip is a sequence of
// vectors, `stride` apart, whose lane l always falls on the same column; one strip of k * floor(width / k) lanes where
// k fits a vector, else ceil(k / width) of them, one vector each per group. So one fused multiply-add per vector and
// rank does all the work, whatever k.
#pragma once

#include <cstdint>

namespace ept {

using std::int64_t;

// One distinct scale and its places in the arrays below. Intermediates (U, V and their gradients) hold, for a block of
// rows, [scale][row][rank][pitch] floats; repeated cores hold [scale][k][pitch] floats for each group.
struct Scale {
    int64_t k;
    int64_t pitch;   // floats of one rank: a whole number of vectors, at least k
    int64_t column;  // of one row's floats before this scale
    int64_t core;    // of a group's repeated core before this scale
    int64_t folded;  // of a group's packed k x k kernels before this scale
};

// A packed factor holds, strip after strip and rank block after rank block, [vectors][ranks of the block][width] floats.
struct Strip {
    int scale;        // index of its scale
    int lanes;        // lanes that count; the others belong to neighbouring vectors
    int copies;       // groups side by side in one vector
    int64_t offset;   // of the first vector in a row, and in a pitch
    int64_t stride;   // elements between vectors
    int64_t vectors;  // in a row
    int64_t whole;    // of them, those that end inside the row
    int64_t start;    // floats of the packed factor before this strip, for each rank
};

struct Side {
    int64_t features;
    int64_t floats;  // of the packed factor, for each rank
    const Strip* strips;
};

struct Layer {
    int64_t rank;
    int num_scales;
    int num_strips;
    const Scale* scales;
    Side in, out;
    int64_t row;     // floats of one row's intermediates
    int64_t core;    // floats of one group's repeated core
    int64_t folded;  // floats of one group's packed kernels
};

}  // namespace ept
