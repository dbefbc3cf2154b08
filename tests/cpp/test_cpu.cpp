// The CPU kernels against the definition in double, without Python or PyTorch: every instruction set of this processor,
// random layers, with and without threads. A failure prints what differed and makes the exit status 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/pyramid.h"
#include "cpu/snapshot.h"
#include "cpu/threads.h"

namespace {

using std::int64_t;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

int failures = 0;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Layer {
    int64_t in, out, rank, rows, groups, segments;
    std::vector<int64_t> scales, group;
    Floats x, A, B, folded, grad;

    explicit Layer(unsigned seed) {
        std::mt19937 random(seed);
        const auto pick = [&](int64_t low, int64_t high) {
            return std::uniform_int_distribution<int64_t>(low, high)(random);
        };
        in = pick(1, 150), out = pick(1, 150), rank = pick(1, 17);
        for (int64_t k = 1; k <= std::min<int64_t>({in, out, 40}); ++k)
            if (pick(0, 7) == 0) scales.push_back(k);
        if (scales.empty()) scales.push_back(1);
        segments = pick(1, 6), groups = pick(1, 4);
        rows = segments * pick(0, 30);
        for (int64_t i = 0; i < segments; ++i) group.push_back(pick(0, groups - 1));
        int64_t packed = 0;
        for (const int64_t k : scales) packed += k * k;
        std::normal_distribution<float> normal;
        const auto draw = [&](int64_t count) {
            Floats values(static_cast<std::size_t>(count));
            for (float& value : values) value = normal(random);
            return values;
        };
        x = draw(rows * in), grad = draw(rows * out);
        A = draw(rank * width()), B = draw(height() * rank), folded = draw(groups * packed);
        for (int64_t i = 0; i < scales[0] * scales[0]; ++i) folded[i] = 0;  // one scale of one group is switched off
    }
    int64_t width() const { return ceil_div(in, scales[0]); }
    int64_t height() const { return ceil_div(out, scales[0]); }
    int64_t packed() const { return static_cast<int64_t>(folded.size()) / groups; }
    ept::Problem problem() const {
        return {in,       out,        rank,       scales, ept::DType::f32, {x.data(), in}, rows,
                A.data(), B.data(),   folded.data(), groups, group.data(), segments, nullptr};
    }
};

struct Truth {
    Doubles y, grad_x, grad_A, grad_B, grad_folded;
};

// y[t, i k + a] += B[i, p] Kbar[a, q] A[p, j] x[t, j k + q], term by term, and its derivatives.
Truth definition(const Layer& l) {
    Truth truth{Doubles(l.rows * l.out), Doubles(l.rows * l.in), Doubles(l.A.size()), Doubles(l.B.size()),
                Doubles(l.folded.size())};
    int64_t start = 0;
    for (const int64_t k : l.scales) {
        for (int64_t t = 0; t < l.rows; ++t) {
            const int64_t kernel = l.group[t / (l.rows / l.segments)] * l.packed() + start;
            Doubles U(l.rank * k), dV(l.rank * k);
            for (int64_t p = 0; p < l.rank; ++p) {
                for (int64_t c = 0; c < l.in; ++c) U[p * k + c % k] += double{l.A[p * l.width() + c / k]} * l.x[t * l.in + c];
                for (int64_t c = 0; c < l.out; ++c) dV[p * k + c % k] += double{l.B[c / k * l.rank + p]} * l.grad[t * l.out + c];
            }
            Doubles V(l.rank * k), dU(l.rank * k);
            for (int64_t p = 0; p < l.rank; ++p)
                for (int64_t a = 0; a < k; ++a)
                    for (int64_t q = 0; q < k; ++q) {
                        const double weight = l.folded[kernel + a * k + q];
                        V[p * k + a] += weight * U[p * k + q];
                        dU[p * k + q] += weight * dV[p * k + a];
                        truth.grad_folded[kernel + a * k + q] += dV[p * k + a] * U[p * k + q];
                    }
            for (int64_t p = 0; p < l.rank; ++p) {
                for (int64_t c = 0; c < l.out; ++c) {
                    truth.y[t * l.out + c] += double{l.B[c / k * l.rank + p]} * V[p * k + c % k];
                    truth.grad_B[c / k * l.rank + p] += V[p * k + c % k] * l.grad[t * l.out + c];
                }
                for (int64_t c = 0; c < l.in; ++c) {
                    truth.grad_x[t * l.in + c] += double{l.A[p * l.width() + c / k]} * dU[p * k + c % k];
                    truth.grad_A[p * l.width() + c / k] += dU[p * k + c % k] * l.x[t * l.in + c];
                }
            }
        }
        start += k * k;
    }
    return truth;
}

void compare(const Floats& actual, const Doubles& exact, const std::string& what) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
        difference += (actual[i] - exact[i]) * (actual[i] - exact[i]);
        size += exact[i] * exact[i];
    }
    if (difference == 0 || std::sqrt(difference / size) < 1e-5) return;  // a NaN fails
    std::printf("%s: relative error %.2e\n", what.c_str(), std::sqrt(difference / size));
    ++failures;
}

void check_layer(unsigned seed, const std::string& where) {
    const Layer layer(seed);
    const Truth truth = definition(layer);
    const float poison = std::numeric_limits<float>::quiet_NaN();
    Floats y(layer.rows * layer.out, poison), grad_x(layer.rows * layer.in, poison), grad_A(layer.A.size(), poison),
        grad_B(layer.B.size(), poison), grad_folded(layer.folded.size(), poison);
    ept::forward(layer.problem(), {y.data(), layer.out, false, nullptr});
    ept::backward(layer.problem(), {layer.grad.data(), layer.out}, {grad_x.data(), layer.in, false, nullptr},
                  grad_A.data(), grad_B.data(), grad_folded.data());
    const std::string name = where + ", layer " + std::to_string(seed);
    compare(y, truth.y, name + ", y");
    compare(grad_x, truth.grad_x, name + ", gradient of x");
    compare(grad_A, truth.grad_A, name + ", gradient of A");
    compare(grad_B, truth.grad_B, name + ", gradient of B");
    compare(grad_folded, truth.grad_folded, name + ", gradient of folded");
}

void check_refusals() {
    Layer layer(1);
    layer.rows = layer.segments;  // whatever was drawn: at least one row
    layer.x.resize(layer.rows * layer.in);
    layer.group.back() = layer.groups;
    Floats y(layer.rows * layer.out);
    try {
        ept::forward(layer.problem(), {y.data(), layer.out, false, nullptr});
        std::puts("a group that does not exist was accepted");
        ++failures;
    } catch (const std::out_of_range&) {
    }
    try {
        ept::select_instruction_set("abacus");
        std::puts("an instruction set that does not exist was accepted");
        ++failures;
    } catch (const std::invalid_argument&) {
    }
}

// A pool as PyTorch's: ranges of equal length, one for each thread.
std::int32_t three_threads(int64_t begin, int64_t end, int64_t, ept::ParallelBody body, void* context) {
    std::vector<std::thread> threads;
    const int64_t chunk = ceil_div(end - begin, 3);
    for (int64_t at = begin; at < end; at += chunk)
        threads.emplace_back(body, at, std::min(end, at + chunk), context);
    for (std::thread& thread : threads) thread.join();
    return 0;
}

std::int32_t count_to_three(std::uint32_t* count) {
    *count = 3;
    return 0;
}

void expect(bool holds, const char* what) {
    if (!holds) ++failures, std::printf("snapshot: %s\n", what);
}

void check_snapshot() {
    Floats first = {1, 2, 3, 4, 5, 6}, second = {7};
    const ept::Snapshot snapshot({{first.data(), 24}, {second.data(), 4}});
    const Floats copy = first;
    expect(snapshot.equals({copy.data(), second.data()}), "equal values elsewhere are equal");
    second[0] = 8;
    expect(!snapshot.equals({first.data(), second.data()}), "a change in the second array shows");
    first[2] = 0;  // in row 1 of three
    const int64_t rows[] = {2, 0};
    expect(snapshot.rows_equal(first.data(), 8, rows, 2, 0), "rows beside the change are equal");
    expect(!snapshot.rows_equal(first.data(), 8, nullptr, 0, 1), "the row with the change is not");
    try {
        snapshot.rows_equal(first.data(), 8, nullptr, 0, 3);
        expect(false, "a row beyond the last is refused");
    } catch (const std::out_of_range&) {
    }
}

}  // namespace

int main() {
    int layers = 0;
    for (const std::string& isa : ept::instruction_sets()) {
        ept::select_instruction_set(isa);
        for (const bool threaded : {false, true}) {
            ept::set_thread_pool(threaded ? three_threads : nullptr, threaded ? count_to_three : nullptr);
            for (unsigned seed = 0; seed < 60; ++seed, ++layers)
                check_layer(seed, isa + (threaded ? " on three threads" : ""));
        }
    }
    check_refusals();
    check_snapshot();
    std::printf("%d layers, %d failures\n", layers, failures);
    return failures != 0;
}
