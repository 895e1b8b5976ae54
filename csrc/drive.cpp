#include "drive.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace secateur {
namespace {

// Bytes a thread takes at a time. Less than the smaller is not worth waking a thread for.
constexpr uint64_t least_piece = 32 << 10;
constexpr uint64_t most_piece = 256 << 10;
constexpr uint64_t none = std::numeric_limits<uint64_t>::max();

uint64_t all_ones(int width) { return none >> (64 - 8 * width); }

uint64_t greatest_key(int width) { return all_ones(width) >> 1; }

// On cache lines of its own, so that threads do not contend for one.
struct alignas(128) Padded {
    Tally tally{0, 0, 0, 0, none};
};

unsigned workers_for(uint64_t bytes) {
    return static_cast<unsigned>(std::clamp<uint64_t>(bytes / least_piece, 1, pool_size()));
}

// Items of `bytes` bytes each, in pieces whose ends are multiples of `unit` items (the last one apart).
struct Share {
    uint64_t items, bytes, unit = 64;
    unsigned workers = workers_for(items * bytes);
    uint64_t least = in_units(least_piece), most = in_units(most_piece);

    uint64_t in_units(uint64_t piece) const { return std::max(piece / bytes / unit * unit, unit); }
    Pieces pieces() const { return Pieces(items, least, most, workers); }
};

// piece(begin, end, worker, tally) over all items; returns the sum of the tallies.
template <class Piece>
Tally over(const Share& share, Piece piece) {
    std::vector<Padded> tallies(share.workers);
    Pieces pieces = share.pieces();
    const auto work = [&](unsigned worker) {
        Tally tally = tallies[worker].tally;
        uint64_t begin, end;
        while (pieces.take(begin, end)) piece(begin, end, worker, &tally);
        tallies[worker].tally = tally;
    };
    run(share.workers, work);
    Tally sum = Padded().tally;
    for (const Padded& t : tallies) add(sum, t.tally);
    return sum;
}

Tally in_width(Tally tally, int width) {
    tally.min_above = std::min(tally.min_above, all_ones(width));
    return tally;
}

}  // namespace

Tally scan(const Kernels& kernels, const Array& a) {
    const WidthKernels& k = of_width(kernels, a.width);
    return over({a.n, uint64_t(a.width)},
                [&](uint64_t begin, uint64_t end, unsigned, Tally* t) { k.scan(at(a, begin), end - begin, t); });
}

namespace {

// Memory for the keys of one piece, a region a worker.
class Buffers {
public:
    explicit Buffers(const Share& share)
        : size_((share.most * share.bytes + 64 + 127) / 128 * 128), memory_(new char[size_ * share.workers]) {}
    char* of(unsigned worker) { return memory_.get() + worker * size_; }

private:
    uint64_t size_;
    std::unique_ptr<char[]> memory_;
};

}  // namespace

Tally bracket(const Kernels& kernels, const Array& a, uint64_t lo, uint64_t hi, void* out, uint64_t capacity) {
    const WidthKernels& k = of_width(kernels, a.width);
    lo = std::min(lo, greatest_key(a.width) + 1);
    hi = std::min(hi, greatest_key(a.width));
    if (lo > hi + 1) {
        Tally apart = bracket(kernels, a, lo, lo - 1, out, capacity);
        apart.min_above = bracket(kernels, a, hi + 1, hi, out, capacity).min_above;
        return apart;
    }
    const Share share{a.n, uint64_t(a.width)};
    Buffers buffers(share);
    std::atomic<uint64_t> used{0};
    Tally sum = over(share, [&](uint64_t begin, uint64_t end, unsigned worker, Tally* t) {
        const uint64_t before = t->inside;
        k.bracket(at(a, begin), end - begin, lo, hi, buffers.of(worker), t);
        const uint64_t found = t->inside - before;
        if (!found) return;
        const uint64_t place = used.fetch_add(found, std::memory_order_relaxed);
        if (place + found > capacity) return;
        std::memcpy(static_cast<char*>(out) + place * a.width, buffers.of(worker), found * a.width);
    });
    if (sum.inside > capacity) sum.inside = none;
    return in_width(sum, a.width);
}

Tally cut_piece(const Kernels& kernels, const Array& a, uint64_t cut_key, uint64_t cut_index, uint64_t begin,
                uint64_t end, bool write) {
    const WidthKernels& k = of_width(kernels, a.width);
    const uint64_t last_before = std::min(cut_key, greatest_key(a.width));
    const uint64_t last_after = std::min(cut_key ? cut_key - 1 : 0, greatest_key(a.width));
    const uint64_t middle = std::clamp(cut_index, begin, end);
    Tally t = Padded().tally;
    const auto part = [&](uint64_t from, uint64_t to, uint64_t last) {
        if (from >= to) return;
        write ? k.fill(at(a, from), to - from, last, &t) : k.count(at(a, from), to - from, last, &t);
    };
    part(begin, middle, last_before);
    part(middle, end, last_after);
    return in_width(t, a.width);
}

Tally cut(const Kernels& kernels, const Array& a, uint64_t cut_key, uint64_t cut_index, bool write) {
    const Tally sum = over({a.n, uint64_t(a.width)}, [&](uint64_t begin, uint64_t end, unsigned, Tally* t) {
        add(*t, cut_piece(kernels, a, cut_key, cut_index, begin, end, write));
    });
    return in_width(sum, a.width);
}

namespace {

// Adds a worker's 32-bit bins to the caller's; most are zero, and empty runs are only read.
void pour(uint32_t* own, int64_t* bins, uint64_t nbins) {
    constexpr uint64_t run = 16;
    for (uint64_t b = 0; b < nbins; b += run) {
        const uint64_t end = std::min(b + run, nbins);
        uint32_t any = 0;
        for (uint64_t i = b; i < end; ++i) any |= own[i];
        if (!any) continue;
        for (uint64_t i = b; i < end; ++i) bins[i] += own[i];
        std::memset(own + b, 0, (end - b) * sizeof *own);
    }
}

}  // namespace

void histogram(const Kernels& kernels, const Array& a, int shift, uint64_t prefix, int64_t* bins, uint64_t nbins) {
    const WidthKernels& k = of_width(kernels, a.width);
    if (nbins == 0 || (nbins & (nbins - 1))) throw std::invalid_argument("the number of bins must be a power of two");
    if (shift < 0 || shift >= 8 * a.width) throw std::invalid_argument("the shift must lie within an element");
    const uint64_t above = greatest_key(a.width) >> shift;  // the key without the bits shifted out
    const bool everything = above < nbins;
    if (prefix > above / nbins) return;
    const uint64_t lo = prefix * nbins << shift, hi = lo + ((nbins << shift) - 1);

    const Share share{a.n, uint64_t(a.width)};
    std::unique_ptr<Buffers> buffers(everything ? nullptr : new Buffers(share));
    std::mutex pouring;
    Pieces pieces = share.pieces();
    const auto work = [&](unsigned worker) {
        std::vector<uint32_t> own(nbins);
        uint64_t held = 0, begin, end;
        const auto flush = [&] {
            const std::lock_guard<std::mutex> lock(pouring);
            pour(own.data(), bins, nbins);
            held = 0;
        };
        while (pieces.take(begin, end)) {
            if (held + (end - begin) > std::numeric_limits<uint32_t>::max()) flush();
            held += end - begin;
            if (everything) {
                k.histogram(at(a, begin), end - begin, shift, nbins - 1, own.data());
            } else {
                Tally inside = Padded().tally;
                k.bracket(at(a, begin), end - begin, lo, hi, buffers->of(worker), &inside);
                k.histogram(buffers->of(worker), inside.inside, shift, nbins - 1, own.data());
            }
        }
        flush();
    };
    run(share.workers, work);
}

uint64_t tie_index_within(const WidthKernels& k, const Array& a, uint64_t key, uint64_t r, uint64_t begin,
                          uint64_t end) {
    while (end - begin > 1) {
        const uint64_t middle = begin + (end - begin) / 2;
        const uint64_t here = k.count_equal(at(a, begin), middle - begin, key);
        if (here >= r) {
            end = middle;
        } else {
            r -= here;
            begin = middle;
        }
    }
    return end;
}

int64_t tie_index(const Kernels& kernels, const Array& a, uint64_t key, uint64_t r) {
    const WidthKernels& k = of_width(kernels, a.width);
    if (r == 0) throw std::invalid_argument("ties are counted from 1");
    if (key > greatest_key(a.width)) return -1;
    const uint64_t wanted = r;
    struct Found {
        uint64_t begin, end, hits;
    };
    const Share share{a.n, uint64_t(a.width)};
    std::vector<std::vector<Found>> found(share.workers);
    std::atomic<uint64_t> hits{0};
    Pieces pieces = share.pieces();
    const auto work = [&](unsigned worker) {
        uint64_t begin, end;
        while (pieces.take(begin, end)) {
            const uint64_t here = k.count_equal(at(a, begin), end - begin, key);
            found[worker].push_back({begin, end, here});
            // Pieces are taken in order: with r hits in those already done, the r-th lies in one already taken.
            if (hits.fetch_add(here, std::memory_order_relaxed) + here >= r) pieces.stop();
        }
    };
    run(share.workers, work);
    std::vector<Found> all;
    for (const auto& some : found) all.insert(all.end(), some.begin(), some.end());
    std::sort(all.begin(), all.end(), [](const Found& x, const Found& y) { return x.begin < y.begin; });
    for (const Found& f : all) {
        if (f.hits < r) {
            r -= f.hits;
            continue;
        }
        return static_cast<int64_t>(tie_index_within(k, a, key, r, f.begin, f.end));
    }
    return -1 - static_cast<int64_t>(wanted - r);
}

void keep(const Kernels& kernels, const Array& a, const uint8_t* bits) {
    const WidthKernels& k = of_width(kernels, a.width);
    over({a.n, uint64_t(a.width)},
         [&](uint64_t begin, uint64_t end, unsigned, Tally*) { k.keep(at(a, begin), end - begin, bits + begin / 8); });
}

void live(const Kernels& kernels, const Array& a, uint8_t* bits) {
    const WidthKernels& k = of_width(kernels, a.width);
    over({a.n, uint64_t(a.width)},
         [&](uint64_t begin, uint64_t end, unsigned, Tally*) { k.live(at(a, begin), end - begin, bits + begin / 8); });
}

Tally prune_groups(const Kernels& kernels, const Array& a, const Groups& groups) {
    const WidthKernels& k = of_width(kernels, a.width);
    if (groups.of == 0 || groups.inner == 0 || groups.prune >= groups.of) {
        throw std::invalid_argument("a group must keep at least one element");
    }
    // Neighbouring columns share vectors and cache lines, unless each is a long run of its own.
    const bool long_runs = groups.inner == 1 && groups.of >= 64;
    const Share share{a.n / groups.of, groups.of * a.width, long_runs ? 1u : 64u};
    const Tally sum = over(share, [&](uint64_t begin, uint64_t end, unsigned, Tally* t) {
        k.prune_groups(a.data, &groups, begin, end, t);
    });
    return in_width(sum, a.width);
}

}  // namespace secateur
