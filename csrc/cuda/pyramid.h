// The layer's static sizes from what a caller passes.
#pragma once

#include <climits>
#include <stdexcept>
#include <string>

#include "params.h"

namespace ept::cuda {

// scales: the distinct kernel sizes, ascending. Throws std::invalid_argument on anything else.
inline Pyramid make_pyramid(int64_t rank, const int64_t* scales, size_t count) {
  if (count < 1 || count > kMaxScales) {
    throw std::invalid_argument("scales must hold 1 to " + std::to_string(kMaxScales) + " distinct kernel sizes, got " +
                                std::to_string(count));
  }
  if (rank < 1) throw std::invalid_argument("A must have at least one row, got " + std::to_string(rank));
  Pyramid pyramid{};
  pyramid.rank = static_cast<int>(rank);
  pyramid.count = static_cast<int>(count);
  int64_t columns = 0, folded = 0;
  for (size_t s = 0; s < count; ++s) {
    if (scales[s] < 1 || (s > 0 && scales[s] <= scales[s - 1])) {
      throw std::invalid_argument("scales must be ascending integers >= 1, got " + std::to_string(scales[s]) +
                                  " in position " + std::to_string(s));
    }
    pyramid.k[s] = static_cast<int>(scales[s]);
    pyramid.column[s] = static_cast<int>(columns);
    pyramid.offset[s] = static_cast<int>(folded);
    columns += rank * scales[s];
    folded += scales[s] * scales[s];
    if (columns > INT_MAX || folded > INT_MAX) {
      throw std::invalid_argument("rank * sum(scales) and sum(scales^2) must be below 2^31, got rank " +
                                  std::to_string(rank) + " and a scale of " + std::to_string(scales[s]));
    }
  }
  pyramid.columns = static_cast<int>(columns);
  pyramid.folded = static_cast<int>(folded);
  return pyramid;
}

// A [r, w] and B [h, r], contiguous.
inline Factor right_factor(const float* A, int64_t width) { return {A, width, 1}; }
inline Factor left_factor(const float* B, int64_t rank) { return {B, 1, rank}; }

}  // namespace ept::cuda
