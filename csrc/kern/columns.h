// N:M where the elements of a group lie apart (inner > 1), a vector of neighbouring columns at a time.
#pragma once

#include "vector.h"

namespace {

constexpr int longest_group = 32;
constexpr int scratch_bytes = 8192;  // with the elements that it is filled from, half of the first cache

// Which elements of the groups of one vector of columns survive, by the rank in the group: every pair is compared once,
// and one of the two ranks goes up. `OF` is the length of the group where unrolling pays, else 0.
template <class V, int OF>
struct ColumnsByRank {
    using Key = typename V::Key;
    static constexpr int most = OF ? OF : longest_group;
    int of;
    typename V::Reg last;

    explicit ColumnsByRank(const Groups& g) : of(OF ? OF : static_cast<int>(g.of)), last(V::set1(Key(g.prune - 1))) {}

    inline void operator()(const typename V::Reg* key, typename V::Mask* survives) const {
        typename V::Reg rank[most];
        const auto one = V::set1(1), minus_one = V::set1(static_cast<Key>(-1));
#pragma GCC unroll 8
        for (int j = 0; j < of; ++j) {
            rank[j] = V::set1(static_cast<Key>(j));  // as if all earlier ones came before
#pragma GCC unroll 8
            for (int i = 0; i < j; ++i) {
                const auto later_first = V::gt(key[i], key[j]);
                rank[i] = V::add_where(rank[i], later_first, one);
                rank[j] = V::add_where(rank[j], later_first, minus_one);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < of; ++j) survives[j] = V::gt(rank[j], last);
    }
};

// The same for four elements a group, as in `OfFour`: by the signs of the six differences.
template <class V, int PRUNE>
struct ColumnsOfFour {
    static constexpr int most = 4, of = 4;

    explicit ColumnsOfFour(const Groups&) {}

    inline void operator()(const typename V::Reg* key, typename V::Mask* survives) const {
        // Negative where the later one is smaller, hence first.
        const auto a = V::sub(key[1], key[0]), b = V::sub(key[2], key[0]), c = V::sub(key[3], key[0]);
        const auto d = V::sub(key[2], key[1]), e = V::sub(key[3], key[1]), f = V::sub(key[3], key[2]);
        const auto not_c = V::all_not(c);
        const auto all = V::from(0);
        survives[0] = V::negative(V::template at_least<PRUNE>(a, b, not_c));
        survives[1] = V::negative(V::template at_least<PRUNE>(d, e, a));
        // Fewer than 4 - PRUNE come after: at least PRUNE come before.
        survives[2] = V::without(all, V::negative(V::template at_least<4 - PRUNE>(b, d, f)));
        survives[3] = V::without(all, V::negative(V::template at_least<4 - PRUNE>(e, f, not_c)));
    }
};

// Prunes one vector of columns and returns whether that changed anything. `part` are the lanes to tally; pruning the others
// again changes nothing.
template <class V, class Survive>
inline bool prune_vector(typename V::Key* p, uint64_t stride, bool write, const Survive& survive, typename V::Mask part,
                         VectorTally<V>& seen) {
    typename V::Reg bits[Survive::most], key[Survive::most];
    typename V::Mask live[Survive::most];
#pragma GCC unroll 8
    for (int j = 0; j < survive.of; ++j) {
        bits[j] = V::load(p + j * stride);
        key[j] = V::all_and(bits[j], magnitude_bits<V>());
    }
    survive(key, live);
    auto lost = V::set1(0);
#pragma GCC unroll 8
    for (int j = 0; j < survive.of; ++j) {
        const auto nonzero = V::gt(key[j], V::set1(0));
        live[j] = V::both(live[j], nonzero);
        seen.see(key[j], V::both(nonzero, part), V::both(live[j], part));
        key[j] = V::keep(live[j], bits[j]);
        lost = V::all_or(lost, V::sub(bits[j], key[j]));
    }
    if (!write || !V::any(lost)) return false;
#pragma GCC unroll 8
    for (int j = 0; j < survive.of; ++j) V::store(p + j * stride, key[j]);
    return true;
}

// n columns, at least one vector of them; the last vector reaches back over columns that are already done.
template <class V, class Survive>
inline bool prune_run(typename V::Key* p, uint64_t stride, uint64_t n, bool write, const Survive& survive,
                      VectorTally<V>& seen) {
    bool changed = false;
    uint64_t c = 0;
    for (; c + V::lanes <= n; c += V::lanes) changed |= prune_vector<V>(p + c, stride, write, survive, V::from(0), seen);
    if (c < n) {
        const int done = static_cast<int>(c + V::lanes - n);
        changed |= prune_vector<V>(p + n - V::lanes, stride, write, survive, V::from(done), seen);
    }
    return changed;
}

// A short copy of exactly these bytes; stores that overlap the one before would take twice as long.
inline void copy_short(const void* source, void* target, uint64_t bytes) {
    const char* from = static_cast<const char*>(source);
    char* to = static_cast<char*>(target);
    uint64_t c = 0;
    for (; c + 16 <= bytes; c += 16) __builtin_memcpy(to + c, from + c, 16);
    if (bytes & 8) __builtin_memcpy(to + c, from + c, 8), c += 8;
    if (bytes & 4) __builtin_memcpy(to + c, from + c, 4), c += 4;
    if (bytes & 2) __builtin_memcpy(to + c, from + c, 2), c += 2;
    if (bytes & 1) to[c] = from[c];
}

// Whole blocks with short rows: brings the rows of several blocks side by side, prunes, and puts them back.
template <class V, class Survive>
inline void prune_packed(typename V::Key* p, uint64_t blocks, const Groups& g, typename V::Key* scratch, uint64_t stride,
                         const Survive& survive, VectorTally<V>& seen) {
    const uint64_t row = g.inner * sizeof(*p);
    auto at = p;
    for (uint64_t b = 0; b < blocks; ++b) {
        for (uint64_t j = 0; j < g.of; ++j, at += g.inner) copy_short(at, scratch + j * stride + b * g.inner, row);
    }
    if (!prune_run<V>(scratch, stride, blocks * g.inner, g.write, survive, seen)) return;
    at = p;
    for (uint64_t b = 0; b < blocks; ++b) {
        for (uint64_t j = 0; j < g.of; ++j, at += g.inner) copy_short(scratch + j * stride + b * g.inner, at, row);
    }
}

template <class V, class Survive>
void prune_columns(typename V::Key* p, const Groups& g, uint64_t first, uint64_t last, Tally* tally) {
    using Key = typename V::Key;
    alignas(64) Key scratch[scratch_bytes / sizeof(Key)];
    // Rows an odd number of cache lines apart: at even ones stores would seem to alias later loads.
    const uint64_t lines = scratch_bytes / 64 / g.of, stride = (lines - 1 + lines % 2) * (64 / sizeof(Key));
    const bool short_rows = g.inner < 4 * V::lanes && g.inner % V::lanes;
    const uint64_t most = short_rows ? stride / g.inner : 0;
    const Survive survive(g);
    VectorTally<V> seen;
    uint64_t done = 0;
    while (first < last) {
        const uint64_t column = first % g.inner, left = last - first;
        const uint64_t blocks = left / g.inner < most ? left / g.inner : most;
        uint64_t n = blocks * g.inner;
        if (column == 0 && n >= V::lanes) {
            prune_packed<V>(p + first * g.of, blocks, g, scratch, stride, survive, seen);
            done += n;
        } else {
            n = left < g.inner - column ? left : g.inner - column;
            if (n >= V::lanes) {
                prune_run<V>(p + (first - column) * g.of + column, g.inner, n, g.write, survive, seen);
                done += n;
            } else {
                prune_groups_scalar<Key>(p, &g, first, first + n, tally);
            }
        }
        first += n;
    }
    tally->below += done * g.of - seen.above;
    seen.pour(done * g.of, tally);
}

}  // namespace
