// N:M where the elements of a group lie apart (inner > 1), a vector of neighbouring columns at a time.
#pragma once

#include "vector.h"

namespace {

constexpr int longest_group = 32;
constexpr int scratch_bytes = 8192;  // with the elements that it is filled from, half of the first cache

// Prunes one vector of columns and returns whether that changed anything. Every pair of elements of a group is compared
// once, and one of the two ranks goes up. `part` are the lanes to tally; pruning the others again changes nothing. `OF` is
// the length of the group where unrolling pays, else 0.
template <class V, int OF>
inline bool prune_vector(typename V::Key* p, uint64_t stride, const Groups& g, typename V::Mask part, VectorTally<V>& seen) {
    using Key = typename V::Key;
    typename V::Reg bits[OF ? OF : longest_group], key[OF ? OF : longest_group], rank[OF ? OF : longest_group];
    const int of = OF ? OF : static_cast<int>(g.of);
    const auto one = V::set1(1), minus_one = V::set1(static_cast<Key>(-1)), last = V::set1(static_cast<Key>(g.prune - 1));
#pragma GCC unroll 8
    for (int j = 0; j < of; ++j) {
        bits[j] = V::load(p + j * stride);
        key[j] = V::all_and(bits[j], magnitude_bits<V>());
        rank[j] = V::set1(static_cast<Key>(j));  // as if all earlier ones came before
#pragma GCC unroll 8
        for (int i = 0; i < j; ++i) {
            const auto later_first = V::gt(key[i], key[j]);
            rank[i] = V::add_where(rank[i], later_first, one);
            rank[j] = V::add_where(rank[j], later_first, minus_one);
        }
    }
    bool changed = false;
#pragma GCC unroll 8
    for (int j = 0; j < of; ++j) {
        const auto nonzero = V::gt(key[j], V::set1(0));
        const auto live = V::both(V::gt(rank[j], last), nonzero);
        if (g.write && V::loses(live, bits[j])) {
            V::store(p + j * stride, V::keep(live, bits[j]));
            changed = true;
        }
        seen.see(key[j], V::both(nonzero, part), V::both(live, part));
    }
    return changed;
}

// n columns, at least one vector of them; the last vector reaches back over columns that are already done.
template <class V, int OF>
inline bool prune_run(typename V::Key* p, uint64_t stride, uint64_t n, const Groups& g, VectorTally<V>& seen) {
    bool changed = false;
    uint64_t c = 0;
    for (; c + V::lanes <= n; c += V::lanes) changed |= prune_vector<V, OF>(p + c, stride, g, V::from(0), seen);
    if (c < n) {
        const int done = static_cast<int>(c + V::lanes - n);
        changed |= prune_vector<V, OF>(p + n - V::lanes, stride, g, V::from(done), seen);
    }
    return changed;
}

// Copies n elements a vector at a time. The last one copies what lies behind them too, up to `end` on the side that ends
// first; later copies put that right.
template <class V>
inline void copy_over(const typename V::Key* from, typename V::Key* to, uint64_t n, uint64_t room) {
    uint64_t c = 0;
    for (; c < n && c + V::lanes <= room; c += V::lanes) V::store(to + c, V::load(from + c));
    for (; c < n; ++c) to[c] = from[c];
}

// Whole blocks whose rows are short: brings the rows of several blocks side by side, prunes, and puts them back.
template <class V, int OF>
inline void prune_packed(typename V::Key* p, uint64_t blocks, const Groups& g, typename V::Key* scratch, uint64_t stride,
                         VectorTally<V>& seen) {
    const uint64_t rows = blocks * g.of, end = rows * g.inner;
    for (uint64_t r = 0; r < rows; ++r) {
        copy_over<V>(p + r * g.inner, scratch + r % g.of * stride + r / g.of * g.inner, g.inner, end - r * g.inner);
    }
    if (!prune_run<V, OF>(scratch, stride, blocks * g.inner, g, seen)) return;
    for (uint64_t r = 0; r < rows; ++r) {
        copy_over<V>(scratch + r % g.of * stride + r / g.of * g.inner, p + r * g.inner, g.inner, end - r * g.inner);
    }
}

// Columns of one block.
template <class V, int OF>
inline uint64_t prune_block(typename V::Key* p, uint64_t n, const Groups& g, VectorTally<V>& seen) {
    if (n < V::lanes) return 0;
    prune_run<V, OF>(p, g.inner, n, g, seen);
    return n;
}

template <class V, int OF>
void prune_columns(typename V::Key* p, const Groups& g, uint64_t first, uint64_t last, Tally* tally) {
    using Key = typename V::Key;
    alignas(64) Key scratch[scratch_bytes / sizeof(Key)];
    const uint64_t stride = scratch_bytes / sizeof(Key) / g.of / V::lanes * V::lanes;
    const uint64_t blocks = stride < g.inner + V::lanes ? 0 : (stride - V::lanes) / g.inner;
    const bool packed = g.inner < 4 * V::lanes && g.inner % V::lanes && blocks * g.inner >= V::lanes;
    VectorTally<V> seen;
    uint64_t done = 0;
    while (first < last) {
        const uint64_t column = first % g.inner, rest = last - first;
        Key* at = p + (first - column) * g.of + column;
        uint64_t n, did;
        if (packed && column == 0 && rest >= V::lanes && rest >= g.inner) {
            n = rest / g.inner < blocks ? rest / g.inner : blocks;
        }
    }
}

}  // namespace
