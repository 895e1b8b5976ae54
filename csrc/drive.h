// Whole tensors: shares one out among the threads, lets the kernels of one instruction set do the pieces, and adds up.
//
// Pointers are aligned to their elements only. `width` is the size of an element in bytes, 1, 2, 4 or 8; a minimum over
// nothing is all ones in that width. Bad arguments throw std::invalid_argument.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "table.h"

namespace secateur {

struct Array {
    void* data;
    uint64_t n;
    int width;
};

inline const WidthKernels& of_width(const Kernels& kernels, int width) {
    switch (width) {
        case 1: return kernels.width[0];
        case 2: return kernels.width[1];
        case 4: return kernels.width[2];
        case 8: return kernels.width[3];
    }
    throw std::invalid_argument("the width of an element must be 1, 2, 4 or 8 bytes");
}

inline char* at(const Array& a, uint64_t i) { return static_cast<char*>(a.data) + i * a.width; }

inline void add(Tally& sum, const Tally& t) {
    sum.below += t.below;
    sum.inside += t.inside;
    sum.zeros += t.zeros;
    sum.max_key = t.max_key > sum.max_key ? t.max_key : sum.max_key;
    sum.min_above = t.min_above < sum.min_above ? t.min_above : sum.min_above;
}

Tally scan(const Kernels& kernels, const Array& a);

// Collects the keys in lo..hi in out[0 … inside-1], in no order; inside is all ones if there are more than `capacity`.
Tally bracket(const Kernels& kernels, const Array& a, uint64_t lo, uint64_t hi, void* out, uint64_t capacity);

// Prunes key < cut_key, key == cut_key before flat index cut_index, and zeros; or only counts them.
Tally cut(const Kernels& kernels, const Array& a, uint64_t cut_key, uint64_t cut_index, bool write);

// The same for elements begin … end-1, in the caller's thread.
Tally cut_piece(const Kernels& kernels, const Array& a, uint64_t cut_key, uint64_t cut_index, uint64_t begin,
                uint64_t end, bool write);

// bins[key >> shift & (nbins - 1)] += 1 where the bits of the key above those are `prefix`.
void histogram(const Kernels& kernels, const Array& a, int shift, uint64_t prefix, int64_t* bins, uint64_t nbins);

// One past the flat index of the r-th element with this key; -1 - n if there are only n.
int64_t tie_index(const Kernels& kernels, const Array& a, uint64_t key, uint64_t r);

// The same among elements begin … end-1, which hold at least r of them, in the caller's thread.
uint64_t tie_index_within(const WidthKernels& k, const Array& a, uint64_t key, uint64_t r, uint64_t begin, uint64_t end);

// Writes +0.0 where the bit of an element, the lowest first, is clear; and sets the bits of those that are not zero.
void keep(const Kernels& kernels, const Array& a, const uint8_t* bits);
void live(const Kernels& kernels, const Array& a, uint8_t* bits);

// a.data as (blocks, of, inner): prunes the `prune` lowest of each group, and zeros; or only counts them.
Tally prune_groups(const Kernels& kernels, const Array& a, const Groups& groups);

}  // namespace secateur
