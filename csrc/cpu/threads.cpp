#include "threads.h"

namespace ept {
namespace {
ParallelFor pool = nullptr;
NumThreads pool_size = nullptr;
}  // namespace

void set_thread_pool(ParallelFor parallel_for, NumThreads num_threads) {
    pool = parallel_for;
    pool_size = num_threads;
}

int num_threads() {
    std::uint32_t count = 1;
    if (pool_size == nullptr || pool_size(&count) != 0) return 1;
    return static_cast<int>(count);
}

void detail::run(std::int64_t count, ParallelBody body, void* context) {
    if (pool == nullptr || count <= 1 || pool(0, count, 1, body, context) != 0) body(0, count, context);
}

}  // namespace ept
