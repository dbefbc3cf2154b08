// The strips of a layer for vectors of a given width.
#pragma once

#include <vector>

#include "layout.h"

namespace ept {

class Plan {
  public:
    Plan(int64_t in_features, int64_t out_features, int64_t rank, const std::vector<int64_t>& scales, int width);
    Plan(const Plan&) = delete;  // `layer` points into the vectors
    Plan& operator=(const Plan&) = delete;

    Layer layer;

  private:
    void cut(Side& side, std::vector<Strip>& strips, int width);

    std::vector<Scale> scales_;
    std::vector<Strip> in_strips_, out_strips_;
};

}  // namespace ept
