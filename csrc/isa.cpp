#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace secateur {
namespace {

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> all{&kernels_base};
#if defined(SECATEUR_HAS_avx2) || defined(SECATEUR_HAS_avx512)
    __builtin_cpu_init();
#endif
#ifdef SECATEUR_HAS_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("fma")) {
        all.push_back(&kernels_avx2);
    }
#endif
#ifdef SECATEUR_HAS_avx512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) {
        all.push_back(&kernels_avx512);
    }
#endif
    return all;
}

const Kernels& find(const std::string& name, const std::string& asked_by) {
    std::string names;
    for (const Kernels* k : usable()) {
        if (name == k->name) return *k;
        names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    throw std::invalid_argument(asked_by + " asks for the native kernels \"" + name +
                                "\", which this build or this processor does not have; it has " + names + ".");
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels* k : usable()) names.push_back(k->name);
    return names;
}

void use_isa(const std::string& name) { in_use = &find(name, "use_isa()"); }

const Kernels& kernels() {
    const Kernels* k = in_use;
    if (k) return *k;
    const char* wanted = std::getenv("SECATEUR_ISA");
    k = wanted && *wanted ? &find(wanted, "SECATEUR_ISA") : usable().back();
    in_use = k;
    return *k;
}

}  // namespace secateur
