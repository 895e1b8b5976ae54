#include "select.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "keys.h"
#include "pool.h"

namespace secateur {
namespace {

constexpr uint64_t none = std::numeric_limits<uint64_t>::max();
constexpr uint64_t small = 1 << 13;   // so few are ordered at once
constexpr uint64_t few = 64;          // so few distinct keys are told apart by counting
constexpr uint64_t piece = 1 << 16;   // elements collected at a time
constexpr uint64_t golden = 0x9E3779B97F4A7C15u;  // 2^64 over the golden ratio: its multiples fall evenly
constexpr uint64_t slack = 64;        // bytes a kernel may write past the last key it collects

// A thread's own memory, kept from tensor to tensor.
template <class T>
struct Scratch {
    std::vector<T> sample, inside, copy, narrower, buffer;
    std::vector<uint64_t> ends;  // how many keys of `inside` come from the pieces up to each
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

// Keys at spread-out positions of one run.
template <class T>
void spread(const T* p, uint64_t n, T* sample, uint64_t size) {
    uint64_t place = 0;
    for (uint64_t i = 0; i < size; ++i) {
        place += golden;
        sample[i] = key_of(p[static_cast<uint64_t>((static_cast<unsigned __int128>(place) * n) >> 64)]);
    }
}

// The window of one run of keys, from a sample of them.
template <class T>
Window window(const T* p, uint64_t n, uint64_t rank, uint64_t size, std::vector<T>& sample) {
    sample.resize(size);
    spread(p, n, sample.data(), size);
    return window_of(sample, double(rank) / double(n));
}

// Collects the keys in the window in `into`, no more than `most`, in the order they have.
template <class T>
bool collect(const WidthKernels& k, const T* p, uint64_t n, Window w, uint64_t most, std::vector<T>& into,
             Scratch<T>& s, Tally* tally) {
    into.clear();
    s.ends.clear();
    s.buffer.resize(piece + slack);
    for (uint64_t begin = 0; begin < n; begin += piece) {
        const uint64_t before = tally->inside;
        k.bracket(p + begin, std::min(piece, n - begin), w.lo, w.hi, s.buffer.data(), tally);
        if (tally->inside > most) return false;
        into.insert(into.end(), s.buffer.begin(), s.buffer.begin() + static_cast<int64_t>(tally->inside - before));
        s.ends.push_back(into.size());
    }
    return true;
}

Tally empty() { return {0, 0, 0, 0, none}; }

// The rank-th smallest of keys that lie in a window, by windows that get narrower. The keys are used up.
template <class T>
T nth(const WidthKernels& k, std::vector<T>& keys, uint64_t rank, Window w, Scratch<T>& s) {
    while (keys.size() > small) {
        const uint64_t n = keys.size();
        if (w.hi - w.lo < few) {  // many ties
            while (w.lo < w.hi) {
                const uint64_t middle = w.lo + (w.hi - w.lo) / 2;
                Tally t = empty();
                k.count(keys.data(), n, middle, &t);
                (t.below >= rank ? w.hi : w.lo) = t.below >= rank ? middle : middle + 1;
            }
            return static_cast<T>(w.lo);
        }
        const Window narrow = window(keys.data(), n, rank, uint64_t(1) << 10, s.sample);
        if (narrow.lo <= w.lo && narrow.hi >= w.hi) break;
        const Window both{std::max(w.lo, narrow.lo), std::min(w.hi, narrow.hi)};
        Tally t = empty();
        collect(k, keys.data(), n, both, n, s.narrower, s, &t);
        if (rank <= t.below || rank > t.below + t.inside) break;
        rank -= t.below;
        w = both;
        keys.swap(s.narrower);
    }
    const auto at = keys.begin() + static_cast<int64_t>(rank - 1);
    std::nth_element(keys.begin(), at, keys.end());
    return *at;
}

// What taking the first `take` of the elements with this key does, given what lies below and how many there are; the
// index is found by the caller where only some of them go.
Pick picked(uint64_t key, uint64_t below, uint64_t take, uint64_t ties, uint64_t above, const Tally& t) {
    if (take == ties) return {true, key + 1, 0, below + ties, above, t.zeros, t.max_key};
    return {true, key, 0, below + take, key, t.zeros, t.max_key};
}

// One past the flat index of the r-th element with this key, by way of the keys collected from each piece.
template <class T>
uint64_t index_by_pieces(const WidthKernels& k, const Array& a, uint64_t key, uint64_t r, Scratch<T>& s) {
    const Array inside{s.inside.data(), s.inside.size(), a.width};
    const uint64_t place = tie_index_within(k, inside, key, r, 0, inside.n);
    const size_t which = static_cast<size_t>(std::lower_bound(s.ends.begin(), s.ends.end(), place) - s.ends.begin());
    const uint64_t before = which ? k.count_equal(inside.data, s.ends[which - 1], key) : 0;
    return tie_index_within(k, a, key, r - before, which * piece, std::min(a.n, (which + 1) * piece));
}

template <class T>
Pick pick(const WidthKernels& k, const Array& a, uint64_t rank, Scratch<T>& s) {
    const T* p = static_cast<const T*>(a.data);
    const bool all = a.n <= small;
    const Window w = all ? Window{1, max_key<T>} : window(p, a.n, rank, std::clamp<uint64_t>(a.n >> (sizeof(T) == 2 ? 9 : 8), 1 << 10, 1 << 12), s.sample);
    const Pick missed{false, 0, 0, 0, 0, 0, 0};
    const uint64_t no_key = none >> (64 - 8 * a.width);
    Tally t = empty();
    if (!collect(k, p, a.n, w, all ? a.n : a.n / 6, s.inside, s, &t)) return missed;
    std::vector<uint64_t> ends = s.ends;
    if (rank <= t.zeros) {
        if (w.lo != 1) return missed;
        Tally live = empty();
        s.buffer.resize(s.inside.size() + slack);
        k.bracket(s.inside.data(), s.inside.size(), 1, 0, s.buffer.data(), &live);
        return picked(0, 0, t.zeros, t.zeros, std::min({live.min_above, t.min_above, no_key}), t);
    }
    if (rank <= t.below || rank > t.below + t.inside) return missed;
    s.copy.assign(s.inside.begin(), s.inside.end());
    const T key = nth(k, s.copy, rank - t.below, w, s);
    s.ends.swap(ends);
    Tally among = empty();
    s.buffer.resize(s.inside.size() + slack);
    k.bracket(s.inside.data(), s.inside.size(), key, key, s.buffer.data(), &among);
    const uint64_t below = t.below + among.below, take = rank - below;
    Pick result = picked(key, below, take, among.inside, std::min({among.min_above, t.min_above, no_key}), t);
    if (take < among.inside) result.cut_index = index_by_pieces(k, a, key, take, s);
    return result;
}

template <class T>
void share_out(const WidthKernels& k, const std::vector<Array>& arrays, const std::vector<uint64_t>& ranks,
               const std::vector<uint64_t>& order, std::vector<Pick>& results) {
    std::atomic<uint64_t> next{0};
    const auto work = [&](unsigned) {
        Scratch<T> scratch;
        for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order.size();) {
            results[order[i]] = pick<T>(k, arrays[order[i]], ranks[order[i]], scratch);
        }
    };
    run(static_cast<unsigned>(std::min<uint64_t>(pool_size(), order.size())), work);
}

// One tally for each array, for each worker.
using Tallies = std::vector<std::vector<Tally>>;

std::vector<Tally> summed(const Tallies& tallies) {
    std::vector<Tally> sums = tallies[0];
    for (size_t w = 1; w < tallies.size(); ++w) {
        for (size_t i = 0; i < sums.size(); ++i) add(sums[i], tallies[w][i]);
    }
    return sums;
}

// All arrays as one run of elements; piece(array, begin, end, worker, tally) for stretches within one array. Returns the
// tally of each array.
template <class Piece>
std::vector<Tally> over_all(const std::vector<Array>& arrays, Piece piece) {
    std::vector<uint64_t> ends;
    uint64_t total = 0, bytes = 1;
    for (const Array& a : arrays) {
        ends.push_back(total += a.n);
        bytes = std::max<uint64_t>(bytes, a.width);
    }
    const unsigned workers = static_cast<unsigned>(std::clamp<uint64_t>(total * bytes >> 15, 1, pool_size()));
    Tallies tallies(workers, std::vector<Tally>(arrays.size(), empty()));
    Pieces pieces(total, 1 << 13, (256 << 10) / bytes, workers);
    run(workers, [&](unsigned worker) {
        uint64_t begin, end;
        while (pieces.take(begin, end)) {
            size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
            for (; begin < end; ++i) {
                const uint64_t start = ends[i] - arrays[i].n, stop = std::min(end, ends[i]);
                if (begin < stop) piece(i, begin - start, stop - start, worker, &tallies[worker][i]);
                begin = std::max(begin, stop);
            }
        }
    });
    return summed(tallies);
}

// Keys of all arrays at spread-out positions, in proportion to size.
template <class T>
std::vector<T> sample_of(const std::vector<Array>& arrays, uint64_t total) {
    const double share = double(std::min<uint64_t>(total, 1 << 16)) / double(total);
    std::vector<uint64_t> starts{0};
    for (const Array& a : arrays) starts.push_back(starts.back() + static_cast<uint64_t>(share * double(a.n)) + (a.n > 0));
    std::vector<T> sample(starts.back());
    std::atomic<size_t> next{0};
    run(pool_size(), [&](unsigned) {
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < arrays.size();) {
            spread(static_cast<const T*>(arrays[i].data), arrays[i].n, &sample[starts[i]], starts[i + 1] - starts[i]);
        }
    });
    return sample;
}

// The keys of all arrays that lie in a window, as they were found: a stretch of memory for each piece of an array.
template <class T>
class Gathered {
public:
    Gathered(const WidthKernels& k, const std::vector<Array>& arrays, Window w, uint64_t most)
        : k_(k), arrays_(arrays), workers_(std::max(1u, pool_size())), inside_(workers_), found_(workers_) {
        for (auto& some : inside_) some.reserve(most);  // address space; only what is written takes memory
        std::vector<std::vector<T>> buffers(workers_);
        std::atomic<uint64_t> collected{0};
        sums = over_all(arrays, [&](size_t i, uint64_t begin, uint64_t end, unsigned worker, Tally* tally) {
            if (collected.load(std::memory_order_relaxed) > most) return;
            std::vector<T>& buffer = buffers[worker];
            buffer.resize((256 << 10) / sizeof(T) + slack);
            Tally t = empty();
            k.bracket(at(arrays[i], begin), end - begin, w.lo, w.hi, buffer.data(), &t);
            if (t.inside) {
                found_[worker].push_back({i, inside_[worker].size(), t.inside});
                inside_[worker].insert(inside_[worker].end(), buffer.begin(), buffer.begin() + static_cast<int64_t>(t.inside));
                collected.fetch_add(t.inside, std::memory_order_relaxed);
            }
            add(*tally, t);
        });
        size = collected;
    }

    std::vector<T> all() const {
        std::vector<T> keys;
        keys.reserve(size);
        for (const auto& some : inside_) keys.insert(keys.end(), some.begin(), some.end());
        return keys;
    }

    // How the keys of each array compare to one of them: below, equal (`inside`), and the smallest above.
    std::vector<Tally> around(T key) const {
        Tallies among(workers_, std::vector<Tally>(arrays_.size(), empty()));
        std::atomic<unsigned> next{0};
        run(workers_, [&](unsigned worker) {
            std::vector<T> ties;
            for (unsigned from; (from = next.fetch_add(1)) < workers_;) {
                for (const Found& f : found_[from]) {
                    ties.resize(f.count + slack);
                    const T* keys = inside_[from].data() + f.begin;
                    k_.bracket(keys, f.count, std::max<uint64_t>(key, 1), key, ties.data(), &among[worker][f.array]);
                }
            }
        });
        return summed(among);
    }

    std::vector<Tally> sums;  // of each array
    uint64_t size;

private:
    struct Found {
        size_t array;
        uint64_t begin, count;
    };
    const WidthKernels& k_;
    const std::vector<Array>& arrays_;
    const unsigned workers_;
    std::vector<std::vector<T>> inside_;
    std::vector<std::vector<Found>> found_;
};

template <class T>
std::vector<Pick> pick_all_wide(const Kernels& kernels, const std::vector<Array>& arrays, uint64_t rank) {
    const WidthKernels& k = of_width(kernels, sizeof(T));
    uint64_t total = 0;
    for (const Array& a : arrays) total += a.n;
    const bool few_in_all = total <= small;
    std::vector<T> sample = sample_of<T>(arrays, std::max<uint64_t>(total, 1));
    const Window w = few_in_all ? Window{1, max_key<T>} : window_of(sample, double(rank) / double(total));
    const uint64_t most = few_in_all ? total : total / 12;
    const Gathered<T> gathered(k, arrays, w, most);
    Tally sum = empty();
    for (const Tally& t : gathered.sums) add(sum, t);
    const bool zeros_only = rank <= sum.zeros;
    const bool missed = zeros_only ? w.lo != 1 : rank <= sum.below || rank > sum.below + gathered.size;
    if (gathered.size > most || missed) return {};
    T key = 0;
    if (!zeros_only) {
        std::vector<T> keys = gathered.all();
        Scratch<T> scratch;
        key = nth(k, keys, rank - sum.below, w, scratch);
    }
    const std::vector<Tally> among = gathered.around(key);
    uint64_t left = rank;
    for (size_t i = 0; i < arrays.size(); ++i) left -= zeros_only ? 0 : gathered.sums[i].below + among[i].below;
    std::vector<Pick> results;
    for (size_t i = 0; i < arrays.size(); ++i) {
        const Tally& t = gathered.sums[i];
        const uint64_t above = std::min({among[i].min_above, t.min_above, none >> (64 - 8 * sizeof(T))});
        const uint64_t below = zeros_only ? 0 : t.below + among[i].below;
        const uint64_t ties = zeros_only ? t.zeros : among[i].inside;
        const uint64_t take = zeros_only ? ties : std::min(left, ties);
        left -= zeros_only ? 0 : take;
        results.push_back(picked(key, below, take, ties, above, t));
        if (take && take < ties) results[i].cut_index = static_cast<uint64_t>(tie_index(kernels, arrays[i], key, take));
    }
    return results;
}

}  // namespace

std::vector<Pick> pick_all(const Kernels& kernels, const std::vector<Array>& arrays, uint64_t rank) {
    switch (arrays.empty() ? 0 : arrays[0].width) {
        case 1: return pick_all_wide<uint8_t>(kernels, arrays, rank);
        case 2: return pick_all_wide<uint16_t>(kernels, arrays, rank);
        case 4: return pick_all_wide<uint32_t>(kernels, arrays, rank);
        case 8: return pick_all_wide<uint64_t>(kernels, arrays, rank);
    }
    return {};
}

std::vector<Tally> cut_each(const Kernels& kernels, const std::vector<Array>& arrays, const std::vector<uint64_t>& keys,
                            const std::vector<uint64_t>& indices, bool write) {
    std::vector<Tally> tallies = over_all(arrays, [&](size_t i, uint64_t begin, uint64_t end, unsigned, Tally* tally) {
        add(*tally, cut_piece(kernels, arrays[i], keys[i], indices[i], begin, end, write));
    });
    for (size_t i = 0; i < arrays.size(); ++i) {
        tallies[i].min_above = std::min(tallies[i].min_above, none >> (64 - 8 * arrays[i].width));
    }
    return tallies;
}

std::vector<Pick> pick_each(const Kernels& kernels, const std::vector<Array>& arrays,
                            const std::vector<uint64_t>& ranks) {
    std::vector<Pick> results(arrays.size());
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
