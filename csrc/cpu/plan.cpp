#include "plan.h"

#include <algorithm>

namespace ept {

Plan::Plan(int64_t in_features, int64_t out_features, int64_t rank, const std::vector<int64_t>& scales, int width)
    : layer{} {
    for (const int64_t k : scales) {
        const int64_t pitch = (k + width - 1) / width * width;
        scales_.push_back({k, pitch, layer.row, layer.core, layer.folded});
        layer.row += rank * pitch;
        layer.core += k * pitch;
        layer.folded += k * k;
    }
    layer.rank = rank;
    layer.num_scales = static_cast<int>(scales_.size());
    layer.scales = scales_.data();
    layer.in.features = in_features;
    layer.out.features = out_features;
    cut(layer.in, in_strips_, width);
    cut(layer.out, out_strips_, width);
    layer.num_strips = static_cast<int>(in_strips_.size());
}

void Plan::cut(Side& side, std::vector<Strip>& strips, int width) {
    for (int s = 0; s < layer.num_scales; ++s) {
        const int64_t k = scales_[s].k;
        for (int64_t offset = 0; offset < k; offset += width) {
            Strip strip{};
            strip.scale = s;
            strip.copies = static_cast<int>(std::max<int64_t>(1, width / k));
            strip.lanes = static_cast<int>(std::min<int64_t>(width, strip.copies * (k - offset)));
            strip.offset = offset;
            strip.stride = strip.copies * k;
            const int64_t left = std::max<int64_t>(0, side.features - offset);
            strip.vectors = (left + strip.stride - 1) / strip.stride;
            strip.whole = left < width ? 0 : (left - width) / strip.stride + 1;
            strip.start = side.floats;
            side.floats += strip.vectors * width;
            strips.push_back(strip);
        }
    }
    side.strips = strips.data();
}

}  // namespace ept
