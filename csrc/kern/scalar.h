// The kernels one element at a time: the whole of the base object, the tails of the vector kernels, and the reference for
// both. Included once by each kernel object, whence the anonymous namespace (see table.h).
#pragma once

#include "../keys.h"
#include "../table.h"

namespace {

using secateur::Groups;
using secateur::Tally;

inline void see(uint64_t key, Tally* tally) {
    tally->zeros += key == 0;
    if (key > tally->max_key) tally->max_key = key;
}

inline void see_above(uint64_t key, Tally* tally) {
    if (key < tally->min_above) tally->min_above = key;
}

template <class T>
void scan_scalar(const void* ptr, uint64_t n, Tally* tally) {
    const T* p = static_cast<const T*>(ptr);
    uint64_t zeros = 0;
    T top = 0;
    for (uint64_t i = 0; i < n; ++i) {
        const T key = key_of(p[i]);
        zeros += key == 0;
        top = key > top ? key : top;
    }
    tally->zeros += zeros;
    if (top > tally->max_key) tally->max_key = top;
}

template <class T>
void bracket_scalar(const void* ptr, uint64_t n, uint64_t lo, uint64_t hi, void* collected, Tally* tally) {
    const T* p = static_cast<const T*>(ptr);
    T* out = static_cast<T*>(collected);
    for (uint64_t i = 0; i < n; ++i) {
        const T key = key_of(p[i]);
        see(key, tally);
        if (key > hi) see_above(key, tally);
        if (key < lo) {
            ++tally->below;
        } else if (key <= hi) {
            *out++ = key;
            ++tally->inside;
        }
    }
}

template <class T, bool WRITE>
void cut_scalar(T* p, uint64_t n, uint64_t last, Tally* tally) {
    for (uint64_t i = 0; i < n; ++i) {
        const T key = key_of(p[i]);
        see(key, tally);
        if (key > last) {
            see_above(key, tally);
        } else {
            ++tally->below;
            if (WRITE && p[i] != 0) p[i] = 0;
        }
    }
}

template <class T>
void count_scalar(const void* p, uint64_t n, uint64_t last, Tally* tally) {
    cut_scalar<T, false>(const_cast<T*>(static_cast<const T*>(p)), n, last, tally);
}

template <class T>
void fill_scalar(void* p, uint64_t n, uint64_t last, Tally* tally) {
    cut_scalar<T, true>(static_cast<T*>(p), n, last, tally);
}

// Eight bytes of elements to a load, and the sign cut off with the bits above the digit: twice as fast as one by one.
template <class T>
void histogram_scalar(const void* ptr, uint64_t n, int shift, uint64_t mask, uint32_t* bins) {
    const T* p = static_cast<const T*>(ptr);
    constexpr uint64_t several = 8 / sizeof(T), bits = 8 * sizeof(T);
    mask &= max_key<T> >> shift;
    uint64_t i = 0;
    for (; i + several <= n; i += several) {
        uint64_t word;
        __builtin_memcpy(&word, p + i, 8);
#pragma GCC unroll 8
        for (uint64_t j = 0; j < several; ++j) ++bins[(word >> (bits * j + shift)) & mask];
    }
    for (; i < n; ++i) ++bins[(uint64_t{p[i]} >> shift) & mask];
}

template <class T>
uint64_t count_equal_scalar(const void* ptr, uint64_t n, uint64_t key) {
    const T* p = static_cast<const T*>(ptr);
    uint64_t found = 0;
    for (uint64_t i = 0; i < n; ++i) found += key_of(p[i]) == key;
    return found;
}

// The product of two floats is exact in double and so is the scaling, so one rounding decides a term, to even.
uint64_t squares_scalar(const void* ptr, uint64_t n, uint64_t over, double scale) {
    const float* values = static_cast<const float*>(ptr);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, values + i, sizeof bits);
        if (key_of(bits) <= over) continue;
        const double x = values[i];
        sum += static_cast<uint64_t>(__builtin_llrint(x * x * scale));
    }
    return sum;
}

template <class T>
void keep_scalar(void* ptr, uint64_t n, const uint8_t* bits) {
    T* p = static_cast<T*>(ptr);
    const auto kept = [&](uint64_t i, int bit) { return T(T(0) - T((bits[i / 8] >> bit) & 1)); };
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) p[i + j] &= kept(i, j);
    }
    for (int j = 0; i + j < n; ++j) p[i + j] &= kept(i, j);
}

template <class T>
void live_scalar(const void* ptr, uint64_t n, uint8_t* bits) {
    const T* p = static_cast<const T*>(ptr);
    for (uint64_t i = 0; i < n; i += 8) {
        unsigned byte = 0;
        for (uint64_t j = 0; j < 8 && i + j < n; ++j) byte |= unsigned(key_of(p[i + j]) != 0) << j;
        bits[i / 8] = static_cast<uint8_t>(byte);
    }
}

// The prune-th smallest key of a group, and how many of the keys equal to it are pruned: the first in the group.
struct GroupCut {
    uint64_t key;
    uint64_t ties;
};

template <class T>
GroupCut sorted_cut(const T* p, const Groups& g) {
    T sorted[32] = {};
    for (uint64_t i = 0; i < g.of; ++i) {
        const T key = key_of(p[i * g.inner]);
        uint64_t at = i;
        for (; at > 0 && sorted[at - 1] > key; --at) sorted[at] = sorted[at - 1];
        sorted[at] = key;
    }
    const T cut = sorted[g.prune - 1];
    uint64_t ties = 0;
    while (ties < g.prune && sorted[g.prune - 1 - ties] == cut) ++ties;
    return {cut, ties};
}

// Byte by byte from the top, counting, so that a large group needs no memory of its own.
template <class T>
GroupCut counted_cut(const T* p, const Groups& g) {
    uint64_t prefix = 0, left = g.prune;
    for (int shift = 8 * (static_cast<int>(sizeof(T)) - 1); shift >= 0; shift -= 8) {
        uint64_t counts[256] = {};
        for (uint64_t i = 0; i < g.of; ++i) {
            const uint64_t key = key_of(p[i * g.inner]);
            if ((key >> shift) >> 8 == prefix) ++counts[(key >> shift) & 255];
        }
        uint64_t digit = 0;
        while (counts[digit] < left) left -= counts[digit++];
        prefix = prefix << 8 | digit;
    }
    return {prefix, left};
}

template <class T>
void prune_column(T* p, const Groups& g, Tally* tally) {
    GroupCut cut = {0, 0};
    if (g.prune) cut = g.of <= 32 ? sorted_cut(p, g) : counted_cut(p, g);
    for (uint64_t i = 0; i < g.of; ++i) {
        T& element = p[i * g.inner];
        const uint64_t key = key_of(element);
        see(key, tally);
        bool pruned = key == 0 || key < cut.key;
        if (key == cut.key && cut.ties) {
            --cut.ties;
            pruned = true;
        }
        if (!pruned) {
            see_above(key, tally);
        } else {
            ++tally->below;
            if (g.write && element != 0) element = 0;
        }
    }
}

template <class T>
void prune_groups_scalar(void* ptr, const Groups* g, uint64_t first, uint64_t last, Tally* tally) {
    T* p = static_cast<T*>(ptr);
    for (uint64_t c = first; c < last; ++c) {
        prune_column(p + c / g->inner * g->inner * g->of + c % g->inner, *g, tally);
    }
}

}  // namespace
