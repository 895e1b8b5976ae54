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
constexpr uint64_t golden = 0x9E3779B97F4A7C15u;  // 2^64 over the golden ratio: its multiples fall evenly
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
    std::vector<T> sample, inside, copy, narrower, buffer;
};

struct Window {
    uint64_t lo, hi;
};

// A range of keys, never 0, that very probably holds the quantile `share`, from a sample (which it reorders).
template <class T>
Window window_of(std::vector<T>& sample, double share) {
    const double size = double(sample.size()), middle = share * size;
    const double margin = 4.5 * std::sqrt(middle * (1 - share)) + 3;
    const auto first = sample.begin(), last = sample.end();
    Window w{1, max_key<T>};
    if (middle + margin < size) {
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

// The window of one run of keys, from keys at spread-out positions.
template <class T>
Window window(const T* p, uint64_t n, uint64_t rank, uint64_t size, std::vector<T>& sample) {
    sample.resize(size);
    uint64_t spread = 0;
    for (T& s : sample) {
        spread += golden;
        s = key_of(p[static_cast<uint64_t>((static_cast<unsigned __int128>(spread) * n) >> 64)]);
    }
    return window_of(sample, double(rank) / double(n));
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

// The rank-th smallest of keys, by windows that get narrower. The keys are used up.
template <class T>
T nth(const WidthKernels& k, std::vector<T>& keys, uint64_t rank, Scratch<T>& s) {
    while (keys.size() > small) {
        const uint64_t n = keys.size();
        const Window w = window(keys.data(), n, rank, uint64_t(1) << 10, s.sample);
        Tally t = empty();
        if (!collect(k, keys.data(), n, w, n / 2, s.narrower, s.buffer, &t)) break;
        if (rank <= t.below || rank > t.below + t.inside) break;
        rank -= t.below;
        keys.assign(s.narrower.begin(), s.narrower.end());
    }
    const auto at = keys.begin() + static_cast<int64_t>(rank - 1);
    std::nth_element(keys.begin(), at, keys.end());
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
    if (!zeros_only) {
        s.copy.assign(s.inside.begin(), s.inside.end());
        result.key = nth(k, s.copy, rank - t.below, s);
    }
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

// All arrays as one run of elements; piece(array, begin, end, worker) for stretches within one array.
template <class Piece>
void over_all(const std::vector<Array>& arrays, Piece piece) {
    std::vector<uint64_t> ends;
    uint64_t total = 0, bytes = 1;
    for (const Array& a : arrays) {
        ends.push_back(total += a.n);
        bytes = std::max<uint64_t>(bytes, a.width);
    }
    const unsigned workers = static_cast<unsigned>(std::clamp<uint64_t>(total * bytes >> 15, 1, pool_size()));
    Pieces pieces(total, 1 << 13, (256 << 10) / bytes, workers);
    run(workers, [&](unsigned worker) {
        uint64_t begin, end;
        while (pieces.take(begin, end)) {
            size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
            for (; begin < end; ++i) {
                const uint64_t start = ends[i] - arrays[i].n, stop = std::min(end, ends[i]);
                if (begin < stop) piece(i, begin - start, stop - start, worker);
                begin = std::max(begin, stop);
            }
        }
    });
}

// One tally for each array, added up over the workers.
using Tallies = std::vector<std::vector<Tally>>;

std::vector<Tally> summed(const Tallies& tallies) {
    std::vector<Tally> sums = tallies[0];
    for (size_t w = 1; w < tallies.size(); ++w) {
        for (size_t i = 0; i < sums.size(); ++i) add(sums[i], tallies[w][i]);
    }
    return sums;
}

template <class T>
std::vector<Kth> kth_of_all_wide(const WidthKernels& k, const std::vector<Array>& arrays, uint64_t rank) {
    uint64_t total = 0;
    for (const Array& a : arrays) total += a.n;
    // The sample, in proportion to size.
    std::vector<T> sample;
    const uint64_t size = std::min<uint64_t>(total, 1 << 16);
    for (const Array& a : arrays) {
        const uint64_t share = static_cast<uint64_t>(double(size) * double(a.n) / double(total)) + (a.n > 0);
        const T* p = static_cast<const T*>(a.data);
        uint64_t spread = 0;
        for (uint64_t j = 0; j < share; ++j) {
            spread += golden;
            sample.push_back(key_of(p[static_cast<uint64_t>((static_cast<unsigned __int128>(spread) * a.n) >> 64)]));
        }
    }
    const Window w = total <= small ? Window{1, max_key<T>} : window_of(sample, double(rank) / double(total));
    // One pass: what lies below, and the keys inside, a stretch of memory a piece.
    struct Found {
        size_t array;
        uint64_t begin, count;
    };
    const unsigned workers = std::max(1u, pool_size());
    const uint64_t most = total <= small ? total : total / 12;
    Tallies tallies(workers, std::vector<Tally>(arrays.size(), empty()));
    std::vector<std::vector<Found>> found(workers);
    std::vector<std::vector<T>> inside(workers), buffers(workers);
    for (auto& some : inside) some.reserve(most);  // address space; only what is written takes memory
    std::atomic<uint64_t> collected{0};
    over_all(arrays, [&](size_t i, uint64_t begin, uint64_t end, unsigned worker) {
        if (collected.load(std::memory_order_relaxed) > most) return;
        std::vector<T>& buffer = buffers[worker];
        buffer.resize((256 << 10) / sizeof(T) + slack);
        Tally t = empty();
        k.bracket(at(arrays[i], begin), end - begin, w.lo, w.hi, buffer.data(), &t);
        if (t.inside) {
            found[worker].push_back({i, inside[worker].size(), t.inside});
            inside[worker].insert(inside[worker].end(), buffer.begin(), buffer.begin() + static_cast<int64_t>(t.inside));
            collected.fetch_add(t.inside, std::memory_order_relaxed);
        }
        add(tallies[worker][i], t);
    });
    if (collected > most) return {};
    const std::vector<Tally> sums = summed(tallies);
    uint64_t below = 0, zeros = 0;
    for (const Tally& t : sums) {
        below += t.below;
        zeros += t.zeros;
    }
    const bool zeros_only = rank <= zeros;
    if (zeros_only ? w.lo != 1 : rank <= below || rank > below + collected) return {};
    T key = 0;
    if (!zeros_only) {
        Scratch<T> s;
        std::vector<T> all;
        all.reserve(collected);
        for (const auto& some : inside) all.insert(all.end(), some.begin(), some.end());
        key = nth(k, all, rank - below, s);
    }
    // What the key means in each array.
    Tallies among(workers, std::vector<Tally>(arrays.size(), empty()));
    std::atomic<unsigned> next{0};
    run(workers, [&](unsigned worker) {
        std::vector<T> ties;
        for (unsigned from; (from = next.fetch_add(1)) < workers;) {
            for (const Found& f : found[from]) {
                ties.resize(f.count + slack);
                k.bracket(inside[from].data() + f.begin, f.count, std::max<uint64_t>(key, 1), key, ties.data(),
                          &among[worker][f.array]);
            }
        }
    });
    const std::vector<Tally> split = summed(among);
    std::vector<Kth> results;
    for (size_t i = 0; i < arrays.size(); ++i) {
        const uint64_t above = std::min({split[i].min_above, sums[i].min_above, none >> (64 - 8 * sizeof(T))});
        results.push_back({true, key, zeros_only ? 0 : sums[i].below + split[i].below,
                           zeros_only ? sums[i].zeros : split[i].inside, above, sums[i].zeros, sums[i].max_key});
    }
    return results;
}

template <class T>
Bins bins_of(const WidthKernels& k, const Array& a, int shift, int room, std::vector<uint32_t>& counts,
             std::vector<LampBin>& table) {
    Tally t = empty();
    k.scan(a.data, a.n, &t);
    Bins result{t.zeros, t.max_key, 0, {}};
    const uint64_t nbins = (uint64_t(max_key<T>) >> shift) + 1;
    if (!k.lamp) {
        counts.assign(nbins, 0);
        for (uint64_t begin = 0; begin < a.n; begin += uint64_t(1) << 31) {  // 32-bit counts do not overflow
            k.histogram(at(a, begin), std::min<uint64_t>(a.n - begin, uint64_t(1) << 31), shift, nbins - 1, counts.data());
        }
        for (uint64_t b = 0; b < nbins; ++b) {
            if (counts[b]) result.bins.push_back({static_cast<int64_t>(b), counts[b], 0});
        }
        return result;
    }
    int e = 0;
    if (sizeof(T) == 4) {
        float largest;
        const uint32_t bits = static_cast<uint32_t>(t.max_key);
        std::memcpy(&largest, &bits, sizeof largest);
        std::frexp(largest, &e);
    } else {
        double largest;
        std::memcpy(&largest, &t.max_key, sizeof largest);
        std::frexp(largest, &e);
    }
    result.scale_exp = room - 2 * e;
    table.assign(nbins, LampBin{0, 0});
    k.lamp(a.data, a.n, shift, std::ldexp(1.0, result.scale_exp), table.data());
    for (uint64_t b = 0; b < nbins; ++b) {
        if (table[b].count) {
            result.bins.push_back({static_cast<int64_t>(b), static_cast<int64_t>(table[b].count), static_cast<int64_t>(table[b].sum)});
        }
    }
    return result;
}

}  // namespace

std::vector<Kth> kth_of_all(const Kernels& kernels, const std::vector<Array>& arrays, uint64_t rank) {
    switch (arrays.empty() ? 0 : arrays[0].width) {
        case 1: return kth_of_all_wide<uint8_t>(kernels.width[0], arrays, rank);
        case 2: return kth_of_all_wide<uint16_t>(kernels.width[1], arrays, rank);
        case 4: return kth_of_all_wide<uint32_t>(kernels.width[2], arrays, rank);
        case 8: return kth_of_all_wide<uint64_t>(kernels.width[3], arrays, rank);
    }
    return {};
}

std::vector<Tally> cut_each(const Kernels& kernels, const std::vector<Array>& arrays, const std::vector<uint64_t>& keys,
                            const std::vector<uint64_t>& indices, bool write) {
    Tallies tallies(std::max(1u, pool_size()), std::vector<Tally>(arrays.size(), empty()));
    over_all(arrays, [&](size_t i, uint64_t begin, uint64_t end, unsigned worker) {
        const Array& a = arrays[i];
        Tally t = cut_piece(kernels, a, keys[i], indices[i], begin, end, write);
        add(tallies[worker][i], t);
    });
    return summed(tallies);
}

std::vector<Bins> bins_of_each(const Kernels& kernels, const std::vector<Array>& arrays, int shift,
                               const std::vector<int>& room) {
    std::vector<Bins> results(arrays.size());
    std::atomic<uint64_t> next{0};
    run(static_cast<unsigned>(std::clamp<uint64_t>(arrays.size(), 1, pool_size())), [&](unsigned) {
        std::vector<uint32_t> counts;
        std::vector<LampBin> table;
        for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < arrays.size();) {
            const Array& a = arrays[i];
            switch (a.width) {
                case 1: results[i] = bins_of<uint8_t>(kernels.width[0], a, shift, room[i], counts, table); break;
                case 2: results[i] = bins_of<uint16_t>(kernels.width[1], a, shift, room[i], counts, table); break;
                case 4: results[i] = bins_of<uint32_t>(kernels.width[2], a, shift, room[i], counts, table); break;
                default: results[i] = bins_of<uint64_t>(kernels.width[3], a, shift, room[i], counts, table);
            }
        }
    });
    return results;
}

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
