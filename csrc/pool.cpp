#include "pool.h"

#include <stdexcept>

namespace secateur {
namespace {

using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);
using GetNumThreads = int32_t (*)(uint32_t*);

std::atomic<ParallelFor> parallel_for{nullptr};
std::atomic<GetNumThreads> get_num_threads{nullptr};

struct Call {
    Work work;
    void* context;
};

}  // namespace

void set_pool(uintptr_t parallel_for_address, uintptr_t get_num_threads_address) {
    const bool both = parallel_for_address && get_num_threads_address;
    parallel_for = both ? reinterpret_cast<ParallelFor>(parallel_for_address) : nullptr;
    get_num_threads = both ? reinterpret_cast<GetNumThreads>(get_num_threads_address) : nullptr;
}

unsigned pool_size() {
    const GetNumThreads ask = get_num_threads;
    uint32_t threads = 1;
    return ask && ask(&threads) == 0 && threads ? threads : 1;
}

void run_work(unsigned workers, Work work, void* context) {
    const ParallelFor split = parallel_for;
    if (workers == 1 || !split) {
        for (unsigned w = 0; w < workers; ++w) work(w, context);
        return;
    }
    Call call{work, context};
    const auto some = [](int64_t begin, int64_t end, void* c) {
        const Call& call = *static_cast<Call*>(c);
        for (int64_t w = begin; w < end; ++w) call.work(static_cast<unsigned>(w), call.context);
    };
    if (split(0, workers, 1, some, &call) != 0) throw std::runtime_error("torch's thread pool reported a failure");
}

}  // namespace secateur
