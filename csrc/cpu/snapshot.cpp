#include "snapshot.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace ept {

Snapshot::Snapshot(const std::vector<std::pair<const void*, int64_t>>& arrays) {
    for (const auto& [address, bytes] : arrays) {
        const auto* first = static_cast<const unsigned char*>(address);
        copies_.emplace_back(first, first + bytes);
    }
}

bool Snapshot::equals(const std::vector<const void*>& arrays) const {
    if (arrays.size() != copies_.size())
        throw std::invalid_argument("arrays must number " + std::to_string(copies_.size()) + ", got " +
                                    std::to_string(arrays.size()));
    for (std::size_t i = 0; i < arrays.size(); ++i)
        if (std::memcmp(arrays[i], copies_[i].data(), copies_[i].size()) != 0) return false;
    return true;
}

bool Snapshot::rows_equal(const void* array, int64_t width, const int64_t* rows, int64_t count, int64_t row) const {
    const std::vector<unsigned char>& copy = copies_.at(0);
    const int64_t height = static_cast<int64_t>(copy.size()) / width;
    for (int64_t i = 0; i < (rows ? count : 1); ++i) {
        const int64_t at = rows ? rows[i] : row;
        if (at < 0 || at >= height)
            throw std::out_of_range("task_ids holds " + std::to_string(at) + "; allowed: 0 to " +
                                    std::to_string(height - 1));
        if (std::memcmp(static_cast<const unsigned char*>(array) + at * width, copy.data() + at * width,
                        static_cast<std::size_t>(width)) != 0)
            return false;
    }
    return true;
}

}  // namespace ept
