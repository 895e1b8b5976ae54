// Torch's own thread pool, reached through the C shim in libtorch_cpu, and the sharing out of a range among its threads.
//
// A second pool beside torch's would fight it for the cores (measured: five to a thousand times slower for both), so
// where the shim is missing the work is done in the caller's thread.
#pragma once

#include <atomic>
#include <cstdint>

namespace secateur {

// Addresses of torch_parallel_for and torch_get_num_threads, or zeros.
void set_pool(uintptr_t parallel_for, uintptr_t get_num_threads);

// Threads that work at once on a large tensor: what torch.get_num_threads() says, or 1.
unsigned pool_size();

using Work = void (*)(unsigned worker, void* context);

// Calls work(0) … work(workers - 1), each once, at the same time where there are threads for it.
void run_work(unsigned workers, Work work, void* context);

template <class F>
void run(unsigned workers, F work) {
    run_work(workers, [](unsigned worker, void* context) { (*static_cast<F*>(context))(worker); }, &work);
}

// Hands out 0 … total in order, in pieces that shrink towards the end, so that one core with less time to spare than the
// others does not make them wait.
class Pieces {
public:
    Pieces(uint64_t total, uint64_t least, uint64_t most, unsigned workers)
        : total_(total), least_(least), most_(most), shares_(2 * workers), next_(0) {}

    bool take(uint64_t& begin, uint64_t& end) {
        begin = next_.load(std::memory_order_relaxed);
        do {
            if (begin >= total_) return false;
            const uint64_t share = (total_ - begin) / shares_ / least_ * least_;
            end = begin + (share < least_ ? least_ : share > most_ ? most_ : share);
            if (end > total_) end = total_;
        } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return true;
    }

    void stop() { next_.store(total_, std::memory_order_relaxed); }

private:
    const uint64_t total_, least_, most_, shares_;
    std::atomic<uint64_t> next_;
};

}  // namespace secateur
