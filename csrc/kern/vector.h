// The kernels a vector at a time, for any `V` that wraps the vectors of one instruction set and one width of elements:
//
//   V::Key, V::Reg, V::Mask, V::lanes
//   load, store, set1, all_and, all_or, all_not,
//   add, sub, max                                           as their names say, on unaligned memory
//   gt(a, b), eq(a, b), negative(a), from(n)                lane masks: signed comparisons, lanes n and up
//   count(m), both(a, b), without(a, b)                     number of lanes, a & b, a & ~b
//   min_where(a, m, b), add_where(a, m, b)                  min(a, b) or a + b where m, else a
//   keep(m, a)                                              a where m, else 0
//   loses(m, a), any(a)                                     whether keep(m, a) differs from a; whether a bit is set
//   collect(out, m, a)                                      writes the lanes of m side by side, returns how many
//   rotate<GROUP, SHIFT>(a)                                 every GROUP bytes down by SHIFT, up to longest_rotation
//   at_least<N>(a, b, c)                                    bits that are set in at least N of a, b and ~c
#pragma once

#include "scalar.h"

namespace {

template <class Key, int N>
struct alignas(64) Lanes {
    Key lane[N];
};

template <class V>
inline typename V::Reg magnitude_bits() {
    return V::set1(max_key<typename V::Key>);
}

template <class V>
inline uint64_t reduce_max(typename V::Reg reg) {
    typename V::Key lanes[V::lanes];
    V::store(lanes, reg);
    uint64_t top = 0;
    for (auto key : lanes) top = key > top ? key : top;
    return top;
}

template <class V>
inline uint64_t reduce_min(typename V::Reg reg) {
    typename V::Key lanes[V::lanes];
    V::store(lanes, reg);
    uint64_t least = lanes[0];
    for (auto key : lanes) least = key < least ? key : least;
    return least;
}

// What a vector loop finds, kept in registers; poured into the caller's tally at the end.
template <class V>
struct VectorTally {
    using Reg = typename V::Reg;
    Reg top = V::set1(0);
    Reg least = magnitude_bits<V>();
    uint64_t nonzeros = 0;
    uint64_t above = 0;

    inline void see(Reg key, typename V::Mask nonzero, typename V::Mask is_above) {
        nonzeros += V::count(nonzero);
        above += V::count(is_above);
        top = V::max(top, key);
        least = V::min_where(least, is_above, key);
    }

    inline void pour(uint64_t elements, Tally* tally) const {
        tally->zeros += elements - nonzeros;
        const uint64_t greatest = reduce_max<V>(top);
        if (greatest > tally->max_key) tally->max_key = greatest;
        if (above) see_above(reduce_min<V>(least), tally);
    }
};

template <class V>
void scan(const void* ptr, uint64_t n, Tally* tally) {
    using Key = typename V::Key;
    const Key* p = static_cast<const Key*>(ptr);
    const auto magnitude = magnitude_bits<V>();
    const auto zero = V::set1(0);
    auto top = zero;
    uint64_t zeros = 0, i = 0;
#pragma GCC unroll 4
    for (; i + V::lanes <= n; i += V::lanes) {
        const auto key = V::all_and(V::load(p + i), magnitude);
        zeros += V::count(V::eq(key, zero));
        top = V::max(top, key);
    }
    tally->zeros += zeros;
    const uint64_t greatest = reduce_max<V>(top);
    if (greatest > tally->max_key) tally->max_key = greatest;
    scan_scalar<Key>(p + i, n - i, tally);
}

template <class V>
void bracket(const void* ptr, uint64_t n, uint64_t lo, uint64_t hi, void* collected, Tally* tally) {
    using Key = typename V::Key;
    const Key* p = static_cast<const Key*>(ptr);
    Key* out = static_cast<Key*>(collected);
    const auto magnitude = magnitude_bits<V>();
    const auto zero = V::set1(0), under = V::set1(static_cast<Key>(lo - 1)), over = V::set1(static_cast<Key>(hi));
    VectorTally<V> seen;
    uint64_t i = 0;
#pragma GCC unroll 2
    for (; i + V::lanes <= n; i += V::lanes) {
        const auto key = V::all_and(V::load(p + i), magnitude);
        const auto above = V::gt(key, over);
        out += V::collect(out, V::without(V::gt(key, under), above), key);
        seen.see(key, V::gt(key, zero), above);
    }
    const uint64_t inside = out - static_cast<Key*>(collected);
    tally->inside += inside;
    tally->below += i - seen.above - inside;
    seen.pour(i, tally);
    bracket_scalar<Key>(p + i, n - i, lo, hi, out, tally);
}

template <class V, bool WRITE>
void cut(typename V::Key* p, uint64_t n, uint64_t last, Tally* tally) {
    using Key = typename V::Key;
    const auto magnitude = magnitude_bits<V>(), zero = V::set1(0), pruned = V::set1(static_cast<Key>(last));
    VectorTally<V> seen;
    uint64_t i = 0;
#pragma GCC unroll 2
    for (; i + V::lanes <= n; i += V::lanes) {
        const auto bits = V::load(p + i);
        const auto key = V::all_and(bits, magnitude);
        const auto live = V::gt(key, pruned);
        // A cache line that stays as it is must not be written back.
        if (WRITE && V::loses(live, bits)) V::store(p + i, V::keep(live, bits));
        seen.see(key, V::gt(key, zero), live);
    }
    tally->below += i - seen.above;
    seen.pour(i, tally);
    cut_scalar<Key, WRITE>(p + i, n - i, last, tally);
}

template <class V>
void count(const void* p, uint64_t n, uint64_t last, Tally* tally) {
    using Key = typename V::Key;
    cut<V, false>(const_cast<Key*>(static_cast<const Key*>(p)), n, last, tally);
}

template <class V>
void fill(void* p, uint64_t n, uint64_t last, Tally* tally) {
    cut<V, true>(static_cast<typename V::Key*>(p), n, last, tally);
}

template <class V>
uint64_t count_equal(const void* ptr, uint64_t n, uint64_t key) {
    using Key = typename V::Key;
    const Key* p = static_cast<const Key*>(ptr);
    const auto magnitude = magnitude_bits<V>(), wanted = V::set1(static_cast<Key>(key));
    uint64_t found = 0, i = 0;
#pragma GCC unroll 4
    for (; i + V::lanes <= n; i += V::lanes) found += V::count(V::eq(V::all_and(V::load(p + i), magnitude), wanted));
    return found + count_equal_scalar<Key>(p + i, n - i, key);
}

}  // namespace
