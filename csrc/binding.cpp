// Python's view of the native code: ept_kernels._C. Tensors come as addresses and sizes, checked by ept_kernels/backends;
// so this module needs neither PyTorch's headers nor its libraries and fits every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/pyramid.h"
#include "cpu/router.h"
#include "cpu/snapshot.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

ept::Problem problem(bool bf16, int64_t in_features, int64_t out_features, int64_t rank, std::vector<int64_t> scales,
                     Address x, int64_t x_stride, int64_t rows, Address A, Address B, Address folded,
                     int64_t num_groups, Address groups, int64_t segments, Address active) {
    return {in_features,
            out_features,
            rank,
            std::move(scales),
            bf16 ? ept::DType::bf16 : ept::DType::f32,
            {at<const void>(x), x_stride},
            rows,
            at<const float>(A),
            at<const float>(B),
            at<const float>(folded),
            num_groups,
            at<const int64_t>(groups),
            segments,
            at<const unsigned char>(active)};
}

// A layer's experts, made once for many calls.
struct Experts {
    std::vector<ept::Expert> list;
    int64_t num_scales = 0, folded_size = 0;
};

Experts experts(const std::vector<std::tuple<int64_t, int64_t, int64_t, float>>& list) {
    Experts experts;
    for (const auto& [k, scale, folded, factor] : list) {
        experts.list.push_back({k, scale, folded, factor});
        experts.num_scales = std::max(experts.num_scales, scale + 1);
        experts.folded_size = std::max(experts.folded_size, folded + k * k);
    }
    return experts;
}

ept::Router router(const Experts& experts, int64_t top_k, int64_t width, Address gate, Address table, int64_t num_tasks,
                   int64_t groups, Address tasks, int64_t first_task, const std::vector<Address>& kernels) {
    ept::Router router{experts.list, experts.num_scales, experts.folded_size,    top_k,      width, at<const float>(gate),
                       at<const float>(table), num_tasks, groups, at<const int64_t>(tasks), first_task, {}};
    for (const Address kernel : kernels) router.kernels.push_back(at<const float>(kernel));
    return router;
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
    info["cpu_compiled"] = ept::compiled_instruction_sets();
    info["cpu_detected"] = ept::instruction_sets();
    info["cpu_selected"] = ept::selected_instruction_set();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native kernels of Expert Pyramid Tuning and what this build holds.";
    module.def("build_info", &build_info, "Compiler; CPU instruction sets compiled, usable on this processor, selected.");
    module.def("select_cpu_isa", &ept::select_instruction_set, py::arg("name"),
               "Uses one of build_info()['cpu_detected'], or the best of them for ''.");
    module.def(
        "set_thread_pool",
        [](Address parallel_for, Address num_threads) {
            ept::set_thread_pool(reinterpret_cast<ept::ParallelFor>(parallel_for),
                                 reinterpret_cast<ept::NumThreads>(num_threads));
        },
        py::arg("parallel_for"), py::arg("num_threads"),
        "Addresses of torch_parallel_for and torch_get_num_threads; zeros: the calling thread does everything.");
    py::class_<ept::Problem>(module, "Problem", "Sizes, adapter and rows of a call; the tensors must outlive it.")
        .def(py::init(&problem), py::arg("bf16"), py::arg("in_features"), py::arg("out_features"), py::arg("rank"),
             py::arg("scales"), py::arg("x"), py::arg("x_stride"), py::arg("rows"), py::arg("A"), py::arg("B"),
             py::arg("folded"), py::arg("num_groups"), py::arg("groups"), py::arg("segments"), py::arg("active"))
        .def(
            "forward",
            [](const ept::Problem& problem, Address y, int64_t y_stride, bool accumulate, Address start) {
                py::gil_scoped_release release;
                ept::forward(problem, {at<void>(y), y_stride, accumulate, at<const void>(start)});
            },
            py::arg("y"), py::arg("y_stride"), py::arg("accumulate"), py::arg("start"),
            "y = start, or what is there, plus the update of each row.")
        .def(
            "backward",
            [](const ept::Problem& problem, Address grad, int64_t grad_stride, Address grad_x, int64_t grad_x_stride,
               bool accumulate, Address grad_A, Address grad_B, Address grad_folded) {
                py::gil_scoped_release release;
                ept::backward(problem, {at<const void>(grad), grad_stride},
                              {at<void>(grad_x), grad_x_stride, accumulate, nullptr}, at<float>(grad_A),
                              at<float>(grad_B), at<float>(grad_folded));
            },
            py::arg("grad"), py::arg("grad_stride"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("accumulate"),
            py::arg("grad_A"), py::arg("grad_B"), py::arg("grad_folded"),
            "Gradients of x, A, B and folded; an address of 0: not wanted.");
    py::class_<Experts>(module, "Experts", "A layer's experts.")
        .def(py::init(&experts), py::arg("experts"),
             "Of each: its size, which scale that is, the floats before it in a folded kernel, and its factor.");
    py::class_<ept::Router>(module, "Router", "The parameters of a router and which tasks it serves.")
        .def(py::init(&router), py::arg("experts"), py::arg("top_k"), py::arg("width"), py::arg("gate"),
             py::arg("table"), py::arg("num_tasks"), py::arg("groups"), py::arg("tasks"), py::arg("first_task"),
             py::arg("kernels"))
        .def(
            "fold",
            [](const ept::Router& router, Address folded, Address active) {
                ept::fold_tasks(router, at<float>(folded), at<unsigned char>(active));
            },
            py::arg("folded"), py::arg("active"), "Routes each task and folds the kernels of its experts.")
        .def(
            "backward",
            [](const ept::Router& router, Address grad_folded, Address grad_gate, Address grad_table,
               const std::vector<Address>& grad_kernels) {
                std::vector<float*> to;
                for (const Address address : grad_kernels) to.push_back(at<float>(address));
                ept::fold_tasks_backward(router, at<const float>(grad_folded), at<float>(grad_gate),
                                         at<float>(grad_table), to);
            },
            py::arg("grad_folded"), py::arg("grad_gate"), py::arg("grad_table"), py::arg("grad_kernels"),
            "Gradients of gate, table and kernels; an address of 0: not wanted.");
    py::class_<ept::Snapshot>(module, "Snapshot", "Copies of small arrays, to tell whether they have changed since.")
        .def(py::init([](const std::vector<std::pair<Address, int64_t>>& arrays) {
                 std::vector<std::pair<const void*, int64_t>> from;
                 for (const auto& [address, bytes] : arrays) from.emplace_back(at<const void>(address), bytes);
                 return ept::Snapshot(from);
             }),
             py::arg("arrays"), "Address and bytes of each.")
        .def(
            "equals",
            [](const ept::Snapshot& snapshot, const std::vector<Address>& arrays) {
                std::vector<const void*> with;
                for (const Address address : arrays) with.push_back(at<const void>(address));
                return snapshot.equals(with);
            },
            py::arg("arrays"), "Whether the arrays at these addresses hold the same bits.")
        .def(
            "rows_equal",
            [](const ept::Snapshot& snapshot, Address array, int64_t width, Address rows, int64_t count, int64_t row) {
                return snapshot.rows_equal(at<const void>(array), width, at<const int64_t>(rows), count, row);
            },
            py::arg("array"), py::arg("width"), py::arg("rows"), py::arg("count"), py::arg("row"),
            "Whether some rows of the first array, of `width` bytes, do: `count` int64 at `rows`, or at 0 the one `row`.");
}
