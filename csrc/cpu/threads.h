// Threads: PyTorch's intra-op pool through its C entry points, which a caller hands over at run time. So this library
// links to no PyTorch and fits every version of it; without one it runs on the calling thread.
#pragma once

#include <cstdint>

namespace ept {

using ParallelBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
// The signatures of torch_parallel_for and torch_get_num_threads (torch/csrc/stable/c/shim.h).
using ParallelFor = std::int32_t (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, ParallelBody, void* context);
using NumThreads = std::int32_t (*)(std::uint32_t* count);

void set_thread_pool(ParallelFor parallel_for, NumThreads num_threads);
int num_threads();

namespace detail {
void run(std::int64_t count, ParallelBody body, void* context);
}

// Calls body(i) for i in 0..count, on several threads where count > 1. The body must not throw.
template <class Body>
void parallel(std::int64_t count, const Body& body) {
    detail::run(
        count,
        [](std::int64_t begin, std::int64_t end, void* context) {
            for (std::int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
        },
        const_cast<Body*>(&body));
}

}  // namespace ept
