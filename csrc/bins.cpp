#include "bins.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "keys.h"
#include "pool.h"

namespace secateur {
namespace {

constexpr uint64_t piece = 1 << 16;  // elements looked at while they are in the cache
constexpr uint64_t slack = 16;       // elements a kernel may write past the last key it collects

// work(i, memory of the thread) for every array, the largest first, so that no thread is left with one at the end.
template <class Memory, class F>
void for_each(const std::vector<Array>& arrays, F work) {
    std::vector<size_t> order(arrays.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return arrays[x].n > arrays[y].n; });
    std::atomic<size_t> next{0};
    run(static_cast<unsigned>(std::clamp<uint64_t>(order.size(), 1, pool_size())), [&](unsigned) {
        Memory memory;
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order.size();) work(order[i], memory);
    });
}

// Adds the bins that occur to what is there, and empties them; runs of empty ones are only read.
void pour(std::vector<uint32_t>& counts, Bins& out) {
    constexpr uint64_t run = 16;
    const std::vector<int64_t> bins = std::move(out.bins), before = std::move(out.counts);
    out.bins.clear();
    out.counts.clear();
    size_t i = 0;
    const auto put = [&](int64_t bin, int64_t count) {
        out.bins.push_back(bin);
        out.counts.push_back(count);
    };
    for (uint64_t b = 0; b < counts.size(); b += run) {
        const uint64_t end = std::min<uint64_t>(b + run, counts.size());
        uint32_t any = 0;
        for (uint64_t j = b; j < end; ++j) any |= counts[j];
        if (!any && !(i < bins.size() && bins[i] < static_cast<int64_t>(end))) continue;
        for (uint64_t j = b; j < end; ++j) {
            int64_t count = std::exchange(counts[j], 0);
            if (i < bins.size() && bins[i] == static_cast<int64_t>(j)) count += before[i++];
            if (count) put(static_cast<int64_t>(j), count);
        }
    }
}

void bins_of(const WidthKernels& k, const Array& a, int shift, std::vector<uint32_t>& counts, Bins& out) {
    counts.resize(uint64_t(1) << (8 * a.width - 1 - shift));
    uint64_t held = 0;
    for (uint64_t begin = 0; begin < a.n; begin += piece) {
        const uint64_t n = std::min(piece, a.n - begin);
        if ((held += n) > uint64_t(1) << 31) {  // 32-bit counts must not overflow
            pour(counts, out);
            held = n;
        }
        k.histogram(at(a, begin), n, shift, counts.size() - 1, counts.data());
    }
    pour(counts, out);
    if (!out.bins.empty() && out.bins[0] == 0) {
        out.zeros = shift ? k.count_equal(a.data, a.n, 0) : static_cast<uint64_t>(out.counts[0]);
    }
}

struct Collected {
    std::vector<uint32_t> buffer, fresh;
};

// Adds sorted keys to an ascending table of distinct ones.
void merge(Keys& table, const std::vector<uint32_t>& fresh) {
    const std::vector<int64_t> keys = std::move(table.keys), counts = std::move(table.counts);
    table.keys.clear();
    table.counts.clear();
    const auto put = [&](int64_t key, int64_t count) {
        table.keys.push_back(key);
        table.counts.push_back(count);
    };
    size_t i = 0;
    for (size_t j = 0; j < fresh.size();) {
        const int64_t key = fresh[j];
        int64_t count = 0;
        for (; j < fresh.size() && fresh[j] == key; ++j) ++count;
        for (; i < keys.size() && keys[i] < key; ++i) put(keys[i], counts[i]);
        if (i < keys.size() && keys[i] == key) count += counts[i++];
        put(key, count);
    }
    for (; i < keys.size(); ++i) put(keys[i], counts[i]);
}

void keys_of(const WidthKernels& k, const Array& a, const Window& w, Collected& memory, Keys& table) {
    const uint64_t high = std::min<uint64_t>(w.high, max_key<uint32_t>);
    const double scale = std::ldexp(1.0, w.scale_exp);
    memory.buffer.resize(piece + slack);
    memory.fresh.clear();
    const auto flush = [&] {
        std::sort(memory.fresh.begin(), memory.fresh.end());
        merge(table, memory.fresh);
        memory.fresh.clear();
    };
    for (uint64_t begin = 0; begin < a.n; begin += piece) {
        const uint64_t n = std::min(piece, a.n - begin);
        Tally t{0, 0, 0, 0, 0};
        k.bracket(at(a, begin), n, w.low, high, memory.buffer.data(), &t);
        memory.fresh.insert(memory.fresh.end(), memory.buffer.begin(), memory.buffer.begin() + static_cast<int64_t>(t.inside));
        if (memory.fresh.size() >= piece) flush();
        table.above += k.squares(at(a, begin), n, high, scale);
    }
    flush();
}

}  // namespace

std::vector<Bins> bins_of_each(const Kernels& kernels, const std::vector<Array>& arrays, int shift) {
    std::vector<Bins> results(arrays.size(), Bins{0, {}, {}});
    for (const Array& a : arrays) {
        if (shift < 0 || shift >= 8 * a.width) throw std::invalid_argument("the shift must lie within an element");
    }
    for_each<std::vector<uint32_t>>(arrays, [&](size_t i, std::vector<uint32_t>& counts) {
        bins_of(of_width(kernels, arrays[i].width), arrays[i], shift, counts, results[i]);
    });
    return results;
}

std::vector<Keys> keys_of_each(const Kernels& kernels, const std::vector<Array>& arrays, const std::vector<Window>& windows) {
    std::vector<Keys> results(arrays.size(), Keys{{}, {}, 0});
    for (size_t i = 0; i < arrays.size(); ++i) {
        if (!of_width(kernels, arrays[i].width).squares) throw std::invalid_argument("squares are added up of float32 alone");
        if (windows[i].low > windows[i].high) throw std::invalid_argument("a window must not be empty");
    }
    for_each<Collected>(arrays, [&](size_t i, Collected& memory) {
        keys_of(of_width(kernels, arrays[i].width), arrays[i], windows[i], memory, results[i]);
    });
    return results;
}

}  // namespace secateur
