#include "router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace ept {
namespace {

constexpr int64_t lanes = 16;  // independent sums, which compilers turn into vectors

float dot(const float* a, const float* b, int64_t count) {
    float sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
        for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    float sum = 0;
    for (; i < count; ++i) sum += a[i] * b[i];
    for (const float part : sums) sum += part;
    return sum;
}

void add_scaled(float* to, const float* from, float factor, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

int64_t task_of(const Router& router, int64_t group) {
    return router.tasks ? router.tasks[group] : router.first_task + group;
}

void check_tasks(const Router& router) {
    for (int64_t g = 0; g < router.groups; ++g)
        if (const int64_t task = task_of(router, g); task < 0 || task >= router.num_tasks)
            throw std::out_of_range("task_ids holds " + std::to_string(task) + "; allowed: 0 to " +
                                    std::to_string(router.num_tasks - 1));
}

void logits_of(const Router& router, int64_t group, std::vector<float>& logits) {
    const float* embedding = router.table + task_of(router, group) * router.width;
    logits.clear();
    for (std::size_t e = 0; e < router.experts.size(); ++e)
        logits.push_back(dot(router.gate + static_cast<int64_t>(e) * router.width, embedding, router.width));
}

// In place, over the values given.
void softmax(float* values, int64_t count) {
    const float highest = *std::max_element(values, values + count);
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - highest);
    for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

// NaN ranks above every number, as in torch.topk: it must show, not vanish.
bool ranks_before(float a, float b) { return std::isnan(b) ? false : std::isnan(a) || a > b; }

// The experts of a task, best first, and their weights. The backward selects anew: it costs less than to keep.
class Selector {
  public:
    explicit Selector(const Router& router) : router_(router), order_(router.experts.size()) {}

    void select(int64_t group) {
        logits_of(router_, group, logits);
        std::iota(order_.begin(), order_.end(), std::size_t{0});
        std::stable_sort(order_.begin(), order_.end(),
                         [&](std::size_t a, std::size_t b) { return ranks_before(logits[a], logits[b]); });
        expert.assign(order_.begin(), order_.begin() + router_.top_k);
        gate.clear();
        for (const std::size_t e : expert) gate.push_back(logits[e]);
        softmax(gate.data(), router_.top_k);
    }

    std::vector<float> logits;        // of all experts
    std::vector<std::size_t> expert;  // top_k
    std::vector<float> gate;          // top_k

  private:
    const Router& router_;
    std::vector<std::size_t> order_;
};

}  // namespace

void fold_tasks(const Router& router, float* folded, unsigned char* active) {
    check_tasks(router);
    std::fill_n(folded, router.groups * router.folded_size, 0.0f);
    std::fill_n(active, router.groups * router.num_scales, static_cast<unsigned char>(0));
    Selector selected(router);
    for (int64_t g = 0; g < router.groups; ++g) {
        selected.select(g);
        for (std::size_t i = 0; i < selected.expert.size(); ++i) {
            const Expert& own = router.experts[selected.expert[i]];
            add_scaled(folded + g * router.folded_size + own.folded, router.kernels[selected.expert[i]],
                       own.factor * selected.gate[i], own.k * own.k);
            active[g * router.num_scales + own.scale] = 1;
        }
    }
}

void fold_tasks_backward(const Router& router, const float* grad_folded, float* grad_gate, float* grad_table,
                         const std::vector<float*>& grad_kernels) {
    const int64_t experts = static_cast<int64_t>(router.experts.size());
    if (grad_gate) std::fill_n(grad_gate, experts * router.width, 0.0f);
    if (grad_table) std::fill_n(grad_table, router.num_tasks * router.width, 0.0f);
    for (std::size_t e = 0; e < router.experts.size(); ++e)
        if (grad_kernels[e]) std::fill_n(grad_kernels[e], router.experts[e].k * router.experts[e].k, 0.0f);
    Selector selected(router);
    std::vector<float> grad_logits(router.experts.size()), slopes;
    for (int64_t g = 0; g < router.groups; ++g) {
        selected.select(g);
        const std::vector<std::size_t>& expert = selected.expert;
        const std::vector<float>& gate = selected.gate;
        std::fill(grad_logits.begin(), grad_logits.end(), 0.0f);
        for (std::size_t i = 0; i < expert.size(); ++i) {
            const std::size_t e = expert[i];
            const Expert& own = router.experts[e];
            const float* grad = grad_folded + g * router.folded_size + own.folded;
            if (grad_kernels[e]) add_scaled(grad_kernels[e], grad, own.factor * gate[i], own.k * own.k);
            grad_logits[e] = own.factor * dot(grad, router.kernels[e], own.k * own.k);
        }
        if (!grad_gate && !grad_table) continue;
        if (router.top_k == 1) {  // the value is 1, the gradient that of the softmax over all experts
            std::vector<float>& probability = selected.logits;
            softmax(probability.data(), experts);
            const std::size_t best = expert[0];
            const float share = probability[best], slope = grad_logits[best];
            float others = 0;
            for (std::size_t e = 0; e < probability.size(); ++e) {
                grad_logits[e] = -slope * share * probability[e];
                if (e != best) others += probability[e];
            }
            grad_logits[best] = slope * share * others;  // not 1 - share, which a saturated router would round to 0
        } else {
            slopes.clear();
            for (const std::size_t e : expert) slopes.push_back(grad_logits[e]);
            for (std::size_t i = 0; i < slopes.size(); ++i) {
                float sum = 0;  // of differences, for the same reason
                for (std::size_t j = 0; j < slopes.size(); ++j) sum += gate[j] * (slopes[i] - slopes[j]);
                grad_logits[expert[i]] = gate[i] * sum;
            }
        }
        const int64_t task = task_of(router, g);
        for (int64_t e = 0; e < experts; ++e) {
            const float slope = grad_logits[static_cast<std::size_t>(e)];
            if (slope == 0) continue;
            if (grad_gate)
                add_scaled(grad_gate + e * router.width, router.table + task * router.width, slope, router.width);
            if (grad_table)
                add_scaled(grad_table + task * router.width, router.gate + e * router.width, slope, router.width);
        }
    }
}

}  // namespace ept
