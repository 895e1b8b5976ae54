// N:M a vector at a time. An element's rank is the number of elements of its group that come before it: those with a
// smaller key, and those with the same key at a lower position. The lowest `prune` ranks are pruned, and every zero.
#pragma once

#include "columns.h"

namespace {

// 1 in the lanes whose neighbour `d` places on lies, around the end of the group, at a lower position.
template <class Key, int N, int M, int D>
constexpr Lanes<Key, N> wrapped() {
    Lanes<Key, N> w = {};
    for (int i = 0; i < N; ++i) w.lane[i] = i % M + D >= M;
    return w;
}

template <class V, int M, int D = 1>
__attribute__((always_inline)) inline typename V::Reg rank_in_lanes(typename V::Reg ordered, typename V::Reg rank) {
    if constexpr (D == M) {
        return rank;
    } else {
        static constexpr auto wrap = wrapped<typename V::Key, V::lanes, M, D>();
        const auto other = V::template rotate<M * sizeof(typename V::Key), D * sizeof(typename V::Key)>(ordered);
        const auto before = V::gt(V::add(ordered, V::load(wrap.lane)), other);
        return rank_in_lanes<V, M, D + 1>(ordered, V::add_where(rank, before, V::set1(1)));
    }
}

// The lanes that survive in groups of M neighbours: those of rank `prune` and more.
template <class V, int M>
struct ByRank {
    typename V::Reg last;

    explicit ByRank(uint64_t prune) : last(V::set1(static_cast<typename V::Key>(prune - 1))) {}

    inline typename V::Mask operator()(typename V::Reg bits, typename V::Reg) const {
        // With the top bit set the order is the same and adding 1 cannot overflow.
        const auto ordered = V::all_or(bits, V::set1(top_bit<typename V::Key>));
        return V::gt(rank_in_lanes<V, M>(ordered, V::set1(0)), last);
    }
};

// The same in groups of four, without counting: a lane survives if at least PRUNE of the three others come before it. The
// difference of two keys, less one, fits its lane, so that its sign is the comparison.
template <class V, int PRUNE>
struct OfFour {
    template <int D>
    static inline typename V::Reg before(typename V::Reg key) {
        using Key = typename V::Key;
        static constexpr auto wrap = wrapped<Key, V::lanes, 4, D>();
        return V::sub(V::template rotate<4 * sizeof(Key), D * sizeof(Key)>(key), V::add(key, V::load(wrap.lane)));
    }

    inline typename V::Mask operator()(typename V::Reg, typename V::Reg key) const {
        using Key = typename V::Key;
        // Three places on is one place back: the comparison that the neighbour there has already made.
        const auto next = before<1>(key), previous = V::template rotate<4 * sizeof(Key), 3 * sizeof(Key)>(next);
        return V::negative(V::template at_least<PRUNE>(next, before<2>(key), previous));
    }
};

// Groups of M neighbours, inner == 1; M is a power of two that divides the lanes.
template <class V, int M, bool WRITE, class Survive>
void prune_neighbours(typename V::Key* p, const Groups& g, uint64_t first, uint64_t last, Survive survive, Tally* tally) {
    const auto magnitude = magnitude_bits<V>(), zero = V::set1(0);
    VectorTally<V> seen;
    const uint64_t begin = first * M, end = last * M;
    uint64_t i = begin;
    for (; i + V::lanes <= end; i += V::lanes) {
        const auto bits = V::load(p + i);
        const auto key = V::all_and(bits, magnitude);
        const auto nonzero = V::gt(key, zero);
        const auto live = V::both(survive(bits, key), nonzero);
        if (WRITE && V::loses(live, bits)) V::store(p + i, V::keep(live, bits));
        seen.see(key, nonzero, live);
    }
    tally->below += i - begin - seen.above;
    seen.pour(i - begin, tally);
    prune_groups_scalar<typename V::Key>(p, &g, i / M, last, tally);
}

template <class V, int M, class Survive>
void prune_neighbours(typename V::Key* p, const Groups& g, uint64_t first, uint64_t last, Survive survive, Tally* tally) {
    if (g.write) {
        prune_neighbours<V, M, true>(p, g, first, last, survive, tally);
    } else {
        prune_neighbours<V, M, false>(p, g, first, last, survive, tally);
    }
}

template <class V, int M>
void prune_neighbours(typename V::Key* p, const Groups& g, uint64_t first, uint64_t last, Tally* tally) {
    if constexpr (M == 4) {
        if (g.prune == 1) return prune_neighbours<V, M>(p, g, first, last, OfFour<V, 1>(), tally);
        if (g.prune == 2) return prune_neighbours<V, M>(p, g, first, last, OfFour<V, 2>(), tally);
        if (g.prune == 3) return prune_neighbours<V, M>(p, g, first, last, OfFour<V, 3>(), tally);
    }
    prune_neighbours<V, M>(p, g, first, last, ByRank<V, M>(g.prune), tally);
}

template <class V>
void prune_groups(void* ptr, const Groups* groups, uint64_t first, uint64_t last, Tally* tally) {
    using Key = typename V::Key;
    Key* p = static_cast<Key*>(ptr);
    const Groups& g = *groups;
    constexpr int widest = V::longest_rotation / sizeof(Key);
    if (g.inner == 1 && g.of == 2) return prune_neighbours<V, 2>(p, g, first, last, tally);
    if constexpr (widest >= 4) {
        if (g.inner == 1 && g.of == 4) return prune_neighbours<V, 4>(p, g, first, last, tally);
    }
    if constexpr (widest >= 8) {
        if (g.inner == 1 && g.of == 8) return prune_neighbours<V, 8>(p, g, first, last, tally);
    }
    if constexpr (widest >= 16) {
        if (g.inner == 1 && g.of == 16) return prune_neighbours<V, 16>(p, g, first, last, tally);
    }
    if (g.inner == 1 || g.of > longest_group) return prune_groups_scalar<Key>(p, groups, first, last, tally);
    if (g.of == 4 && g.prune == 1) return prune_columns<V, ColumnsOfFour<V, 1>>(p, g, first, last, tally);
    if (g.of == 4 && g.prune == 2) return prune_columns<V, ColumnsOfFour<V, 2>>(p, g, first, last, tally);
    if (g.of == 4 && g.prune == 3) return prune_columns<V, ColumnsOfFour<V, 3>>(p, g, first, last, tally);
    if (g.of == 8) return prune_columns<V, ColumnsByRank<V, 8>>(p, g, first, last, tally);
    prune_columns<V, ColumnsByRank<V, 0>>(p, g, first, last, tally);
}

template <class V>
constexpr secateur::WidthKernels row(uint64_t (*squares)(const void*, uint64_t, uint64_t, double)) {
    using Key = typename V::Key;
    return {scan<V>, bracket<V>,       count<V>,         fill<V>,        histogram_scalar<Key>, count_equal<V>,
            squares, keep_scalar<Key>, live_scalar<Key>, prune_groups<V>};
}

}  // namespace
