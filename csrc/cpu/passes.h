// Forward and backward over a range of rows, in blocks of rows that stay in the second-level cache from pass to pass.
#pragma once

#include "core.h"
#include "expand.h"
#include "kernels.h"
#include "pairs.h"
#include "shrink.h"
#include "wgrad.h"

namespace ept::EPT_ISA {

// Rows of a block: their x and y fill a part of the second-level cache; a multiple of the tile of three.
static int64_t block_rows(const Layer& layer) {
    const int64_t widest = most(layer.in.features, layer.out.features);
    return most(12, least(48, (int64_t{48} << 10) / widest)) / 12 * 12;
}

static int64_t group_of(const Cores& cores, int64_t row) { return cores.groups ? cores.groups[row / cores.segment] : 0; }

// Calls f(first, last, group) for the runs of rows begin..end that share a kernel.
template <class Function>
EPT_INLINE void each_run(const Cores& cores, int64_t begin, int64_t end, Function f) {
    for (int64_t row = begin; row < end;) {
        const int64_t last = cores.groups ? least(end, (row / cores.segment + 1) * cores.segment) : end;
        f(row, last, group_of(cores, row));
        row = last;
    }
}

// Whether the flag of this scale is up for the kernel of any row of begin..end.
static bool is_any(const unsigned char* flags, const Layer& layer, const Cores& cores, int scale, int64_t begin,
                   int64_t end) {
    bool any = false;
    each_run(cores, begin, end, [&](int64_t, int64_t, int64_t group) {
        any = any || flags[group * layer.num_scales + scale];
    });
    return any;
}

// Whether any row of begin..end uses this scale.
static bool is_active(const Layer& layer, const Cores& cores, int scale, int64_t begin, int64_t end) {
    return is_any(cores.active, layer, cores, scale, begin, end);
}

// Whether the gradient of this scale's kernel is wanted for any row of begin..end.
static bool is_wanted(const Layer& layer, const Cores& cores, int scale, int64_t begin, int64_t end) {
    return is_any(cores.wanted, layer, cores, scale, begin, end);
}

// All strips of one scale: they follow one another.
template <class Function>
EPT_INLINE void each_strip(const Layer& layer, const Side& side, int scale, Function f) {
    for (int i = 0; i < layer.num_strips; ++i)
        if (side.strips[i].scale == scale) f(side.strips[i]);
}

// result = values through each row's kernel; zeros where that is zero. Arrays: [rows][rank][pitch] of this scale.
static void core_rows(const Layer& layer, const Cores& cores, const float* tables, int scale_index, int64_t begin,
                      int64_t end, const float* values, float* result) {
    const Scale& scale = layer.scales[scale_index];
    const int64_t row = layer.rank * scale.pitch;
    each_run(cores, begin, end, [&](int64_t first, int64_t last, int64_t group) {
        float* out = result + (first - begin) * row;
        if (cores.active[group * layer.num_scales + scale_index]) {
            const float* table = tables + group * layer.core + scale.core;
            apply_core(scale, (last - first) * layer.rank, values + (first - begin) * row, table, out);
        } else {
            for (int64_t i = 0; i < (last - first) * row; ++i) out[i] = 0;
        }
    });
}

// A block of output rows: what expand adds up in fp32, and the conversion where the rows are not fp32.
template <class E>
class Output;

template <>
class Output<float> {
  public:
    Output(const Side& side, const MutableRows& rows, float*) : features_(side.features), rows_(rows) {}
    float* begin(int64_t first, int64_t count) {
        float* out = static_cast<float*>(rows_.data) + first * rows_.stride;
        if (rows_.accumulate) return out;
        const float* start = static_cast<const float*>(rows_.start);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t c = 0; c < features_; ++c) out[t * rows_.stride + c] = start ? start[c] : 0.0f;
        return out;
    }
    int64_t stride() const { return rows_.stride; }
    void finish(int64_t, int64_t) {}
    static int64_t scratch(const Side&, int64_t) { return 0; }

  private:
    int64_t features_;
    MutableRows rows_;
};

template <>
class Output<bf16> {
  public:
    Output(const Side& side, const MutableRows& rows, float* scratch)
        : features_(side.features), rows_(rows), scratch_(scratch) {}
    float* begin(int64_t first, int64_t count) {
        const bf16* out = static_cast<const bf16*>(rows_.data) + first * rows_.stride;
        const bf16* start = static_cast<const bf16*>(rows_.start);
        for (int64_t t = 0; t < count; ++t) {
            const bf16* from = rows_.accumulate ? out + t * rows_.stride : start;
            each_vector([&](int64_t c, int64_t lanes) {
                const F value = from ? (lanes == W ? load(from + c) : load_part(from + c, lanes)) : F{};
                store(scratch_ + t * stride() + c, value);
            });
        }
        return scratch_;
    }
    int64_t stride() const { return padded(features_); }
    void finish(int64_t first, int64_t count) {
        bf16* out = static_cast<bf16*>(rows_.data) + first * rows_.stride;
        for (int64_t t = 0; t < count; ++t)
            each_vector([&](int64_t c, int64_t lanes) {
                const F value = load(scratch_ + t * stride() + c);
                if (lanes == W) store(out + t * rows_.stride + c, value);
                else store_part(out + t * rows_.stride + c, value, lanes);
            });
    }
    static int64_t scratch(const Side& side, int64_t rows) { return rows * padded(side.features); }

  private:
    static int64_t padded(int64_t features) { return (features + W - 1) / W * W; }
    template <class Function>
    void each_vector(Function f) {
        for (int64_t c = 0; c < features_; c += W) f(c, least(W, features_ - c));
    }
    int64_t features_;
    MutableRows rows_;
    float* scratch_;
};

// Adds every active scale's expansion to a block of rows, some columns at a time.
template <class E>
static void expand_block(const Layer& layer, const Cores& cores, const Side& side, Output<E>& output, int64_t first,
                         int64_t last, const Packed& packed, const float* repeated) {
    const auto* factor = static_cast<const typename Factor<E>::type*>(packed.expand);
    const int64_t rows = last - first;
    float* y = output.begin(first, rows);
    for (int64_t column = 0; column < side.features; column += expand_chunk * W) {
        for (int s = 0; s < layer.num_scales; ++s) {
            if (!is_active(layer, cores, s, first, last)) continue;
            each_strip(layer, side, s, [&](const Strip& strip) {
                // Vectors that begin in this chunk of columns.
                const auto vectors_before = [&](int64_t c) {
                    return most(0, least(strip.vectors, (c - strip.offset + strip.stride - 1) / strip.stride));
                };
                const int64_t from = vectors_before(column), to = vectors_before(column + expand_chunk * W);
                if (from < to)
                    expand(layer, side, strip, from, to, y, output.stride(), rows, factor,
                           repeated + layer.scales[s].column * rows);
            });
        }
    }
    output.finish(first, rows);
}

template <class E>
static const E* row_of(const Rows& rows, int64_t row) {
    return static_cast<const E*>(rows.data) + row * rows.stride;
}

template <class E>
static const typename Factor<E>::type* shrink_factor(const Packed& packed) {
    return static_cast<const typename Factor<E>::type*>(packed.shrink);
}

// dU as wgrad wants it for rows of E: as it is, or as pairs of rows, for which there is scratch.
template <class E>
static const typename Factor<E>::type* wgrad_factor([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t row,
                                                    const float* dU, [[maybe_unused]] float* scratch) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(E) == sizeof(bf16)) {
        std::uint32_t* pairs = reinterpret_cast<std::uint32_t*>(scratch);
        pair_rows(rows, row, dU, pairs);
        return pairs;
    } else
#endif
        return dU;
}

static int64_t intermediate_floats(const Layer& layer) { return block_rows(layer) * layer.row + W; }

// How many scales shrink a block, and in which order: those that are active and, with `core`, those that are wanted.
class Turns {
  public:
    Turns(const Layer& layer, const Cores& cores, bool core, int64_t first, int64_t last) : turn_{-1, 0} {
        for (int s = 0; s < layer.num_scales; ++s)
            turn_.of += is_active(layer, cores, s, first, last) ||
                        (core && is_wanted(layer, cores, s, first, last));
    }
    Turn next() { return ++turn_.index, turn_; }

  private:
    Turn turn_;
};

template <class E>
static void forward_rows(const Forward& call, int64_t begin, int64_t end, float* scratch) {
    const Layer& layer = *call.layer;
    float* U = scratch;
    float* V = U + intermediate_floats(layer);
    Output<E> y(layer.out, call.y, V + intermediate_floats(layer));
    for (int64_t first = begin; first < end; first += block_rows(layer)) {
        const int64_t last = least(end, first + block_rows(layer)), rows = last - first;
        Turns turns(layer, call.cores, false, first, last);
        for (int s = 0; s < layer.num_scales; ++s) {
            if (!is_active(layer, call.cores, s, first, last)) continue;
            const Turn turn = turns.next();
            const int64_t at = layer.scales[s].column * rows;
            each_strip(layer, layer.in, s, [&](const Strip& strip) {
                shrink(layer, layer.in, strip, row_of<E>(call.x, first), call.x.stride, rows, turn,
                       shrink_factor<E>(call.A), U + at);
            });
            core_rows(layer, call.cores, call.cores.columns, s, first, last, U + at, V + at);
        }
        expand_block<E>(layer, call.cores, layer.out, y, first, last, call.B, V);
    }
}

template <class E>
static void backward_rows(const Backward& call, int64_t begin, int64_t end, const Partial& partial, float* scratch) {
    const Layer& layer = *call.layer;
    float* U = scratch;
    float* dV = U + intermediate_floats(layer);
    float* V = dV + intermediate_floats(layer);
    float* dU = V + intermediate_floats(layer);
    float* pairs = dU + intermediate_floats(layer);
    const bool need_x = call.grad_x.data != nullptr;
    Output<E> grad_x(layer.in, call.grad_x, pairs + intermediate_floats(layer));
    for (int64_t first = begin; first < end; first += block_rows(layer)) {
        const int64_t last = least(end, first + block_rows(layer)), rows = last - first;
        const E* x = row_of<E>(call.x, first);
        const E* grad = row_of<E>(call.grad, first);
        Turns turns(layer, call.cores, call.need_core, first, last);
        for (int s = 0; s < layer.num_scales; ++s) {
            const Scale& scale = layer.scales[s];
            const bool active = is_active(layer, call.cores, s, first, last);
            const bool core = call.need_core && is_wanted(layer, call.cores, s, first, last);
            const int64_t at = scale.column * rows, row = layer.rank * scale.pitch;
            if (!active && !core) continue;
            const Turn turn = turns.next();
            if (core || call.need_B)
                each_strip(layer, layer.in, s, [&](const Strip& strip) {
                    shrink(layer, layer.in, strip, x, call.x.stride, rows, turn,
                           shrink_factor<E>(call.A), U + at);
                });
            if (core || need_x || call.need_A)
                each_strip(layer, layer.out, s, [&](const Strip& strip) {
                    shrink(layer, layer.out, strip, grad, call.grad.stride, rows, turn,
                           shrink_factor<E>(call.B), dV + at);
                });
            if (core) {
                each_run(call.cores, first, last, [&](int64_t from, int64_t to, int64_t group) {
                    if (!call.cores.wanted[group * layer.num_scales + s]) return;
                    core_gradient(scale, (to - from) * layer.rank, U + at + (from - first) * row,
                                  dV + at + (from - first) * row, partial.core + group * layer.core + scale.core);
                });
            }
            if (!active) continue;
            if (call.need_B) {
                core_rows(layer, call.cores, call.cores.columns, s, first, last, U + at, V + at);
                const auto* factor = wgrad_factor<E>(rows, row, V + at, pairs);
                each_strip(layer, layer.out, s, [&](const Strip& strip) {
                    wgrad(layer, layer.out, strip, grad, call.grad.stride, rows, factor, partial.B);
                });
            }
            if (need_x || call.need_A)
                core_rows(layer, call.cores, call.cores.rows, s, first, last, dV + at, dU + at);
            if (call.need_A) {
                const auto* factor = wgrad_factor<E>(rows, row, dU + at, pairs);
                each_strip(layer, layer.in, s, [&](const Strip& strip) {
                    wgrad(layer, layer.in, strip, x, call.x.stride, rows, factor, partial.A);
                });
            }
        }
        if (need_x) expand_block<E>(layer, call.cores, layer.in, grad_x, first, last, call.A, dU);
    }
}

}  // namespace ept::EPT_ISA
