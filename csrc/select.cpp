#include "select.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "pool.h"

namespace secateur {
namespace {

constexpr uint64_t none = std::numeric_limits<uint64_t>::max();
constexpr uint64_t small = 1 << 13;   // so few are ordered at once
constexpr uint64_t piece = 1 << 16;   // elements collected at a time
constexpr uint64_t slack = 64;        // bytes a kernel may write past the last key it collects

template <class T>
constexpr T max_key = T(T(~T(0)) >> 1);

template <class T>
T key_of(T bits) {
    return T(bits & max_key<T>);
}

// A thread's own memory, kept from tensor to tensor.
template <class T>
struct Scratch {
    std::vector<T> sample, inside, narrower, buffer;
};

struct Window {
    uint64_t lo, hi;
};

// A range of keys, never 0, that very probably holds the rank-th smallest of n, from keys at spread-out positions.
template <class T>
Window window(const T* p, uint64_t n, uint64_t rank, uint64_t size, std::vector<T>& sample) {
    sample.resize(size);
    uint64_t spread = 0;
    for (T& s : sample) {
        spread += 0x9E3779B97F4A7C15u;  // 2^64 over the golden ratio: its multiples fall evenly
        s = key_of(p[static_cast<uint64_t>((static_cast<unsigned __int128>(spread) * n) >> 64)]);
    }
    const double share = double(rank) / double(n), middle = share * double(size);
    const double margin = 4.5 * std::sqrt(middle * (1 - share)) + 3;
    const auto first = sample.begin(), last = sample.end();
    Window w{1, max_key<T>};
    if (middle + margin < double(size)) {
        const auto at = first + static_cast<int64_t>(middle + margin);
        std::nth_element(first, at, last);
        w.hi = *at;
    }
    if (middle - margin > 0) {
        const auto at = first + static_cast<int64_t>(middle - margin);
        std::nth_element(first, at, last);
        w.lo = std::max<uint64_t>(*at, 1);
    }
    return w;
}

// Appends the keys in the window to `into`, no more than `most`.
template <class T>
bool collect(const WidthKernels& k, const T* p, uint64_t n, Window w, uint64_t most, std::vector<T>& into,
             std::vector<T>& buffer, Tally* tally) {
    into.clear();
    buffer.resize(piece + slack);
    for (uint64_t begin = 0; begin < n; begin += piece) {
        const uint64_t before = tally->inside;
        k.bracket(p + begin, std::min(piece, n - begin), w.lo, w.hi, buffer.data(), tally);
        if (tally->inside > most) return false;
        into.insert(into.end(), buffer.begin(), buffer.begin() + static_cast<int64_t>(tally->inside - before));
    }
    return true;
}

Tally empty() { return {0, 0, 0, 0, none}; }

// The rank-th smallest of keys, by windows that get narrower.
template <class T>
T nth(const WidthKernels& k, const std::vector<T>& keys, uint64_t rank, Scratch<T>& s) {
    s.narrower.assign(keys.begin(), keys.end());
    while (s.narrower.size() > small) {
        const uint64_t n = s.narrower.size();
        const Window w = window(s.narrower.data(), n, rank, uint64_t(1) << 10, s.sample);
        s.buffer.resize(n + slack);
        Tally t = empty();
        k.bracket(s.narrower.data(), n, w.lo, w.hi, s.buffer.data(), &t);
        if (rank <= t.below || rank > t.below + t.inside || t.inside == n) break;
        rank -= t.below;
        s.narrower.assign(s.buffer.begin(), s.buffer.begin() + static_cast<int64_t>(t.inside));
    }
    const auto at = s.narrower.begin() + static_cast<int64_t>(rank - 1);
    std::nth_element(s.narrower.begin(), at, s.narrower.end());
    return *at;
}

template <class T>
Kth kth(const WidthKernels& k, const Array& a, uint64_t rank, Scratch<T>& s) {
    const T* p = static_cast<const T*>(a.data);
    const bool all = a.n <= small;
    const Window w = all ? Window{1, max_key<T>} : window(p, a.n, rank, std::clamp<uint64_t>(a.n >> 8, 1 << 10, 1 << 12), s.sample);
    Tally t = empty();
    Kth result{false, 0, 0, 0, 0, 0, 0};
    if (!collect(k, p, a.n, w, all ? a.n : a.n / 6, s.inside, s.buffer, &t)) return result;
    result.zeros = t.zeros;
    result.max_key = t.max_key;
    const bool zeros_only = rank <= t.zeros;
    if (!zeros_only && (rank <= t.below || rank > t.below + t.inside)) return result;
    if (zeros_only && w.lo != 1) return result;
    Tally among = empty();
    if (!zeros_only) result.key = nth(k, s.inside, rank - t.below, s);
    s.buffer.resize(s.inside.size() + slack);
    k.bracket(s.inside.data(), s.inside.size(), std::max<uint64_t>(result.key, 1), result.key, s.buffer.data(), &among);
    result.below = zeros_only ? 0 : t.below + among.below;
    result.ties = zeros_only ? t.zeros : among.inside;
    result.above = std::min({among.min_above, t.min_above, none >> (64 - 8 * a.width)});
    result.found = true;
    return result;
}

template <class T>
void share_out(const WidthKernels& k, const std::vector<Array>& arrays, const std::vector<uint64_t>& ranks,
               const std::vector<uint64_t>& order, std::vector<Kth>& results) {
    std::atomic<uint64_t> next{0};
    const auto work = [&](unsigned) {
        Scratch<T> scratch;
        for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order.size();) {
            results[order[i]] = kth<T>(k, arrays[order[i]], ranks[order[i]], scratch);
        }
    };
    run(static_cast<unsigned>(std::min<uint64_t>(pool_size(), order.size())), work);
}

}  // namespace

std::vector<Kth> kth_of_each(const Kernels& kernels, const std::vector<Array>& arrays,
                             const std::vector<uint64_t>& ranks) {
    std::vector<Kth> results(arrays.size());
    for (int w = 0; w < 4; ++w) {
        std::vector<uint64_t> order;
        for (uint64_t i = 0; i < arrays.size(); ++i) {
            if (arrays[i].width == 1 << w && arrays[i].n) order.push_back(i);
        }
        if (order.empty()) continue;
        // The largest first, so that no thread is left with one at the end.
        std::stable_sort(order.begin(), order.end(), [&](uint64_t x, uint64_t y) { return arrays[x].n > arrays[y].n; });
        const WidthKernels& k = kernels.width[w];
        switch (w) {
            case 0: share_out<uint8_t>(k, arrays, ranks, order, results); break;
            case 1: share_out<uint16_t>(k, arrays, ranks, order, results); break;
            case 2: share_out<uint32_t>(k, arrays, ranks, order, results); break;
            default: share_out<uint64_t>(k, arrays, ranks, order, results);
        }
    }
    return results;
}

}  // namespace secateur
