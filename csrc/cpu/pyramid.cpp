// One call from beginning to end: plan, pack, share the rows among threads, sum what they found.
#include "pyramid.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>

#include "plan.h"
#include "select.h"
#include "threads.h"

namespace ept {
namespace {

// Floats on a cache line of their own; not initialised.
class Buffer {
  public:
    explicit Buffer(int64_t floats)
        : data_(static_cast<float*>(::operator new(static_cast<std::size_t>(floats) * sizeof(float), alignment))) {}
    float* data() const { return data_.get(); }

  private:
    static constexpr std::align_val_t alignment{64};
    struct Free {
        void operator()(float* data) const { ::operator delete(data, alignment); }
    };
    std::unique_ptr<float, Free> data_;
};

// The tables of every group's kernels, for both directions, which of them are not zero and whose gradient is wanted.
class PackedCores {
  public:
    PackedCores(const Layer& layer, const Problem& problem)
        : tables_(2 * layer.core * problem.num_groups),
          active_(static_cast<std::size_t>(layer.num_scales * problem.num_groups)),
          wanted_(active_.size(), 1),
          used_(static_cast<std::size_t>(layer.num_scales)),
          any_wanted_(static_cast<std::size_t>(layer.num_scales)) {
        float* columns = tables_.data();
        float* rows = columns + layer.core * problem.num_groups;
        if (problem.active) wanted_.assign(problem.active, problem.active + active_.size());
        for (int64_t g = 0; g < problem.num_groups; ++g)
            for (int s = 0; s < layer.num_scales; ++s) {
                any_wanted_[static_cast<std::size_t>(s)] |=
                    wanted_[static_cast<std::size_t>(g * layer.num_scales + s)] != 0;
                const Scale& scale = layer.scales[s];
                const float* kernel = problem.folded + g * layer.folded + scale.folded;
                const bool active = std::any_of(kernel, kernel + scale.k * scale.k, [](float v) { return v != 0; });
                active_[static_cast<std::size_t>(g * layer.num_scales + s)] = active;
                used_[static_cast<std::size_t>(s)] |= active;
                if (active) fill(layer, s, kernel, columns + g * layer.core, rows + g * layer.core);
            }
        cores = {columns,        rows,           active_.data(),
                 wanted_.data(), problem.groups, problem.rows / std::max<int64_t>(1, problem.segments)};
    }
    bool used(int scale) const { return used_[static_cast<std::size_t>(scale)]; }
    bool wanted(int scale) const { return any_wanted_[static_cast<std::size_t>(scale)]; }

    Cores cores;

  private:
    // Repeats a kernel along the lanes, as far as whole copies go; the lanes behind them are zero.
    static void fill(const Layer& layer, int s, const float* kernel, float* columns, float* rows) {
        const auto [k, pitch, column, core, folded] = layer.scales[s];
        const int64_t repeated = pitch / k * k;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t lane = 0; lane < pitch; ++lane) {
                columns[core + i * pitch + lane] = lane < repeated ? kernel[lane % k * k + i] : 0.0f;
                rows[core + i * pitch + lane] = lane < repeated ? kernel[i * k + lane % k] : 0.0f;
            }
    }

    Buffer tables_;
    std::vector<unsigned char> active_, wanted_, used_, any_wanted_;
};

void check_groups(const Problem& problem) {
    for (int64_t i = 0; problem.groups != nullptr && i < problem.segments; ++i)
        if (problem.groups[i] < 0 || problem.groups[i] >= problem.num_groups)
            throw std::out_of_range("groups holds " + std::to_string(problem.groups[i]) + "; allowed: 0 to " +
                                    std::to_string(problem.num_groups - 1));
}

// Columns of a factor: groups of the smallest scale.
int64_t columns_of(const Layer& layer, const Side& side) {
    return (side.features + layer.scales[0].k - 1) / layer.scales[0].k;
}

// A and B repeated along the lanes, for the scales that `wanted` names.
class PackedFactors {
  public:
    template <class Wanted>
    PackedFactors(const Kernels& kernels, const Layer& layer, const Problem& problem, bool in_parallel, Wanted wanted)
        : pairs_(kernels.takes_pairs(problem.dtype)),
          memory_((pairs_ ? 3 : 1) * layer.rank * (layer.in.floats + layer.out.floats)),
          A(place(memory_.data(), layer.rank * layer.in.floats)),
          B(place(memory_.data() + (pairs_ ? 3 : 1) * layer.rank * layer.in.floats, layer.rank * layer.out.floats)) {
        // Rank by rank, each followed by zeros, which packing may read.
        const int64_t width = columns_of(layer, layer.in), height = columns_of(layer, layer.out);
        const int64_t A_stride = width + kernels.width, B_stride = height + kernels.width;
        const Buffer plain(layer.rank * (A_stride + B_stride));
        float* const plain_B = plain.data() + layer.rank * A_stride;
        for (int64_t p = 0; p < layer.rank; ++p) {
            float* a = std::copy_n(problem.A + p * width, width, plain.data() + p * A_stride);
            std::fill_n(a, kernels.width, 0.0f);
            float* b = plain_B + p * B_stride;
            for (int64_t i = 0; i < height; ++i) *b++ = problem.B[i * layer.rank + p];
            std::fill_n(b, kernels.width, 0.0f);
        }
        const auto one = [&](int64_t task) {
            const int strip = static_cast<int>(task / 2);
            if (!wanted(layer.in.strips[strip].scale)) return;
            if (task % 2 == 0) kernels.pack(layer, layer.in, strip, problem.dtype, plain.data(), A_stride, A);
            else kernels.pack(layer, layer.out, strip, problem.dtype, plain_B, B_stride, B);
        };
        const int64_t tasks = 2 * int64_t{layer.num_strips};
        if (in_parallel) parallel(tasks, one);
        else for (int64_t task = 0; task < tasks; ++task) one(task);
    }

  private:
    Packed place(float* memory, int64_t floats) const {
        if (!pairs_) return {memory, memory, memory};
        return {memory, memory + floats, memory + 2 * floats};
    }

    bool pairs_;
    Buffer memory_;

  public:
    Packed A, B;
};

// Zeros for the sums of the scales in use, whose strips alone are added to and read.
void clear(const Layer& layer, const Side& side, const PackedCores& cores, int width, float* sums) {
    for (int i = 0; i < layer.num_strips; ++i) {
        const Strip& strip = side.strips[i];
        if (cores.used(strip.scale))
            std::fill_n(sums + layer.rank * strip.start, layer.rank * strip.vectors * width, 0.0f);
    }
}

// Multiply-adds below which another thread costs more than it saves.
constexpr int64_t least_work = int64_t{1} << 19;

// Depends on sizes and the number of threads only, so that sums are the same in every run.
int64_t count_tasks(const Problem& problem) {
    const int64_t row = (problem.in_features + problem.out_features) * problem.rank *
                        static_cast<int64_t>(problem.scales.size());
    const int64_t useful = std::max<int64_t>(1, problem.rows * row / least_work);
    return std::max<int64_t>(1, std::min({static_cast<int64_t>(num_threads()), useful, problem.rows}));
}

// Rows before task i of `count`: whole blocks where there are enough.
int64_t first_row(int64_t i, int64_t count, int64_t rows, int64_t block) {
    const int64_t unit = rows >= 2 * count * block ? block : 1;
    const int64_t units = (rows + unit - 1) / unit;
    return std::min(rows, units * i / count * unit);
}

}  // namespace

void forward(const Problem& problem, const MutableRows& y) {
    check_groups(problem);
    if (problem.rows == 0) return;
    const Kernels& kernels = selected_kernels();
    const Plan plan(problem.in_features, problem.out_features, problem.rank, problem.scales, kernels.width);
    const Layer& layer = plan.layer;
    const PackedCores cores(layer, problem);
    const int64_t tasks = count_tasks(problem);
    const PackedFactors factors(kernels, layer, problem, tasks > 1, [&](int scale) { return cores.used(scale); });
    const Forward call{&layer, problem.dtype, problem.x, y, factors.A, factors.B, cores.cores};
    const int64_t floats = kernels.forward_scratch(call), block = kernels.block_rows(layer);
    const Buffer scratch(tasks * floats);
    parallel(tasks, [&](int64_t i) {
        kernels.forward(call, first_row(i, tasks, problem.rows, block), first_row(i + 1, tasks, problem.rows, block),
                        scratch.data() + i * floats);
    });
}

void backward(const Problem& problem, const Rows& grad, const MutableRows& grad_x, float* grad_A, float* grad_B,
              float* grad_folded) {
    check_groups(problem);
    const Kernels& kernels = selected_kernels();
    const Plan plan(problem.in_features, problem.out_features, problem.rank, problem.scales, kernels.width);
    const Layer& layer = plan.layer;
    const int64_t width = columns_of(layer, layer.in), height = columns_of(layer, layer.out);
    if (grad_A) std::fill_n(grad_A, layer.rank * width, 0.0f);
    if (grad_B) std::fill_n(grad_B, layer.rank * height, 0.0f);
    if (grad_folded) std::fill_n(grad_folded, problem.num_groups * layer.folded, 0.0f);
    if (problem.rows == 0) return;

    const PackedCores cores(layer, problem);
    const int64_t tasks = count_tasks(problem);
    const PackedFactors factors(kernels, layer, problem, tasks > 1,
                                [&](int scale) { return (grad_folded && cores.wanted(scale)) || cores.used(scale); });
    const Backward call{&layer,    problem.dtype, grad,        problem.x,         grad_x,
                        factors.A, factors.B,     cores.cores, grad_A != nullptr, grad_B != nullptr,
                        grad_folded != nullptr};
    const int64_t sums_A = grad_A ? layer.rank * layer.in.floats : 0;
    const int64_t sums_B = grad_B ? layer.rank * layer.out.floats : 0;
    const int64_t sums_core = grad_folded ? layer.core * problem.num_groups : 0;
    const int64_t sums = sums_A + sums_B + sums_core, floats = kernels.backward_scratch(call);
    const int64_t block = kernels.block_rows(layer);
    const Buffer memory(tasks * (sums + floats));
    const auto partial = [&](int64_t i) {
        float* start = memory.data() + i * (sums + floats);
        return Partial{start, start + sums_A, start + sums_A + sums_B};
    };
    parallel(tasks, [&](int64_t i) {
        const Partial mine = partial(i);
        if (grad_A) clear(layer, layer.in, cores, kernels.width, mine.A);
        if (grad_B) clear(layer, layer.out, cores, kernels.width, mine.B);
        std::fill_n(mine.core, sums_core, 0.0f);
        kernels.backward(call, first_row(i, tasks, problem.rows, block), first_row(i + 1, tasks, problem.rows, block),
                         mine, mine.A + sums);
    });

    // Every sum over the tasks goes in the order of the tasks, that over the scales in the order of the scales.
    std::vector<const float*> parts_A, parts_B;
    for (int64_t i = 0; i < tasks; ++i) {
        parts_A.push_back(partial(i).A);
        parts_B.push_back(partial(i).B);
    }
    const Buffer by_rank(grad_B ? layer.rank * height : 0);  // the gradient of B, transposed
    const auto unpack = [&](int64_t p) {
        float* rank_B = by_rank.data() + p * height;
        if (grad_B) std::fill_n(rank_B, height, 0.0f);
        for (int strip = 0; strip < layer.num_strips; ++strip) {
            if (!cores.used(layer.in.strips[strip].scale)) continue;
            if (grad_A)
                kernels.unpack(layer, layer.in, strip, p, parts_A.data(), static_cast<int>(tasks), grad_A + p * width);
            if (grad_B)
                kernels.unpack(layer, layer.out, strip, p, parts_B.data(), static_cast<int>(tasks), rank_B);
        }
        for (int64_t i = 0; grad_B && i < height; ++i) grad_B[i * layer.rank + p] = rank_B[i];
    };
    if (tasks > 1) parallel(layer.rank, unpack);
    else for (int64_t p = 0; p < layer.rank; ++p) unpack(p);
    for (int64_t i = 0; grad_folded && i < tasks; ++i)
        for (int64_t g = 0; g < problem.num_groups; ++g)
            for (int s = 0; s < layer.num_scales; ++s) {
                const Scale& scale = layer.scales[s];
                const float* from = partial(i).core + g * layer.core + scale.core;  // [q][lane of a]
                float* to = grad_folded + g * layer.folded + scale.folded;
                for (int64_t a = 0; a < scale.k; ++a)
                    for (int64_t q = 0; q < scale.k; ++q) to[a * scale.k + q] += from[q * scale.pitch + a];
            }
}

}  // namespace ept
