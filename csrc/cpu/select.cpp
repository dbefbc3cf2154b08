// Which instruction sets this build holds, which of them this processor has, and the one in use.
#include "select.h"

#include <atomic>
#include <stdexcept>

#include "pyramid.h"

namespace ept {

#define EPT_DECLARE(isa)              \
    namespace isa {                   \
    extern const Kernels kernels;     \
    }
#ifdef EPT_X86
EPT_DECLARE(avx512bf16)
EPT_DECLARE(avx512)
EPT_DECLARE(avx2)
#endif
EPT_DECLARE(portable)

namespace {

struct Choice {
    const Kernels* kernels;
    bool (*runs_here)();
};

#ifdef EPT_X86
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Choice choices[] = {  // best first
#ifdef EPT_X86
    {&avx512bf16::kernels, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {&avx512::kernels, [] { return has_avx512(); }},
    {&avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&portable::kernels, [] { return true; }},
};

const Kernels* best() {
    for (const Choice& choice : choices)
        if (choice.runs_here()) return choice.kernels;
    return &portable::kernels;
}

std::atomic<const Kernels*> selected{nullptr};

std::vector<std::string> names(bool here_only) {
    std::vector<std::string> found;
    for (const Choice& choice : choices)
        if (!here_only || choice.runs_here()) found.emplace_back(choice.kernels->name);
    return found;
}

}  // namespace

const Kernels& selected_kernels() {
    const Kernels* kernels = selected.load(std::memory_order_relaxed);
    if (kernels == nullptr) selected.store(kernels = best(), std::memory_order_relaxed);
    return *kernels;
}

std::vector<std::string> instruction_sets() { return names(true); }
std::vector<std::string> compiled_instruction_sets() { return names(false); }
std::string selected_instruction_set() { return selected_kernels().name; }

void select_instruction_set(const std::string& name) {
    if (name.empty()) return selected.store(best(), std::memory_order_relaxed);
    for (const Choice& choice : choices)
        if (name == choice.kernels->name && choice.runs_here())
            return selected.store(choice.kernels, std::memory_order_relaxed);
    std::string allowed;
    for (const std::string& known : names(true)) allowed += (allowed.empty() ? "" : ", ") + known;
    throw std::invalid_argument("instruction set '" + name + "' is not built or not on this processor; allowed: " +
                                allowed);
}

}  // namespace ept
