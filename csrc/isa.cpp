#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "crc.h"

namespace secateur {
namespace {

#ifdef SECATEUR_HAS_avx2
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("fma");
}
#endif

#ifdef SECATEUR_HAS_avx512
bool has_avx512() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

#ifdef SECATEUR_HAS_product_amx
// Linux gives a process the tiles only when it asks, and may refuse.
bool has_amx() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return false;
#ifdef __linux__
    constexpr long request_permission = 0x1023, tile_data = 18;
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
#else
    return false;
#endif
}
#endif

std::vector<const Kernels*> usable(const Kernels*) {
    std::vector<const Kernels*> all{&kernels_base};
#ifdef SECATEUR_HAS_avx2
    if (has_avx2()) all.push_back(&kernels_avx2);
#endif
#ifdef SECATEUR_HAS_avx512
    if (has_avx512()) all.push_back(&kernels_avx512);
#endif
    return all;
}

std::vector<const ProductKernels*> usable(const ProductKernels*) {
    std::vector<const ProductKernels*> all{&products_base};
#ifdef SECATEUR_HAS_product_avx2
    if (has_avx2()) all.push_back(&products_avx2);
#endif
#ifdef SECATEUR_HAS_product_avx512
    if (has_avx512()) all.push_back(&products_avx512);
#endif
#ifdef SECATEUR_HAS_product_avx512bf16
    if (has_avx512() && __builtin_cpu_supports("avx512bf16")) all.push_back(&products_avx512bf16);
#endif
#ifdef SECATEUR_HAS_product_amx
    if (has_avx512() && __builtin_cpu_supports("avx512bf16") && has_amx()) all.push_back(&products_amx);
#endif
    return all;
}

template <class T>
std::vector<std::string> names() {
    std::vector<std::string> found;
    for (const T* k : usable(static_cast<const T*>(nullptr))) found.push_back(k->name);
    return found;
}

template <class T>
const T& find(const std::string& name, const std::string& asked_by) {
    for (const T* k : usable(static_cast<const T*>(nullptr)))
        if (name == k->name) return *k;
    std::string have;
    for (const std::string& n : names<T>()) have += (have.empty() ? "" : ", ") + n;
    throw std::invalid_argument(asked_by + " asks for the native kernels \"" + name +
                                "\", which this build or this processor does not have; it has " + have + ".");
}

template <class T>
std::atomic<const T*> in_use{nullptr};

template <class T>
const T& chosen(std::initializer_list<const char*> variables) {
    const T* k = in_use<T>;
    if (k) return *k;
    k = usable(static_cast<const T*>(nullptr)).back();
    for (const char* variable : variables) {
        const char* wanted = std::getenv(variable);
        if (wanted && *wanted) {
            k = &find<T>(wanted, variable);
            break;
        }
    }
    in_use<T> = k;
    return *k;
}

}  // namespace

bool has_clmul() {
#ifdef SECATEUR_HAS_crc
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.2");
#else
    return false;
#endif
}

std::vector<std::string> usable_isas() { return names<Kernels>(); }
std::vector<std::string> usable_product_isas() { return names<ProductKernels>(); }

void use_isa(const std::string& name) { in_use<Kernels> = &find<Kernels>(name, "use_isa()"); }
void use_product_isa(const std::string& name) { in_use<ProductKernels> = &find<ProductKernels>(name, "use_product_isa()"); }

const Kernels& kernels() { return chosen<Kernels>({"SECATEUR_ISA"}); }
const ProductKernels& product_kernels() { return chosen<ProductKernels>({"SECATEUR_PRODUCT_ISA", "SECATEUR_ISA"}); }

}  // namespace secateur
