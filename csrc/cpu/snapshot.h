// Copies of small arrays, to tell whether anything in them has changed since: whoever wrote there, and by whatever way.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace ept {

using std::int64_t;

// Immutable: any number of threads may ask at once.
class Snapshot {
public:
    // arrays: address and bytes of each.
    explicit Snapshot(const std::vector<std::pair<const void*, int64_t>>& arrays);

    // Whether arrays of the same sizes hold the same bits. Throws std::invalid_argument for another number of them.
    bool equals(const std::vector<const void*>& arrays) const;

    // Whether some rows of the first array, `width` bytes each, do: `rows` of them by number, or, where null, the one
    // numbered `row`. Throws std::out_of_range for a row that it lacks.
    bool rows_equal(const void* array, int64_t width, const int64_t* rows, int64_t count, int64_t row) const;

private:
    std::vector<std::vector<unsigned char>> copies_;
};

}  // namespace ept
