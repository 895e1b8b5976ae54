// What one kernel object offers: a table of plain functions, one row a width of the elements.
//
// Kernels see floats as unsigned integers. The *key* of an element is its bits without the sign: the order of keys is the
// order of magnitudes, and key 0 is a zero weight. A key has a clear top bit, so signed comparisons order keys as well.
//
// Every kernel works on one run of elements in the caller's thread and adds to what its `Tally` holds.
#pragma once

#include <cstdint>

namespace secateur {

// Plain data without constructors: an inline function here would be compiled once per instruction set, and the linker
// could keep the copy that only some machines can run.
struct Tally {
    uint64_t below;      // elements under the range asked for, or pruned
    uint64_t inside;     // elements collected
    uint64_t zeros;      // elements that were zero before the call
    uint64_t max_key;
    uint64_t min_above;  // smallest key above the range asked for, or of the survivors
};

// A contiguous tensor as (blocks, of, inner); a group is `of` elements, `inner` apart. Column c is the group c % inner of
// block c / inner.
struct Groups {
    uint64_t of;
    uint64_t inner;
    uint64_t prune;
    bool write;
};

struct WidthKernels {
    void (*scan)(const void* p, uint64_t n, Tally* tally);
    // Writes the keys in lo..hi, lo <= hi + 1, to `collected`, which has room for n keys and 64 bytes more.
    void (*bracket)(const void* p, uint64_t n, uint64_t lo, uint64_t hi, void* collected, Tally* tally);
    // Prunes keys up to and including `last`; `count` only says what `fill` would do.
    void (*count)(const void* p, uint64_t n, uint64_t last, Tally* tally);
    void (*fill)(void* p, uint64_t n, uint64_t last, Tally* tally);
    void (*histogram)(const void* p, uint64_t n, int shift, uint64_t mask, uint32_t* bins);
    uint64_t (*count_equal)(const void* p, uint64_t n, uint64_t key);
    // The sum of rint(x * x * scale) over the floats whose keys are above `over`, modulo 2^64; null but for width 4.
    uint64_t (*squares)(const void* p, uint64_t n, uint64_t over, double scale);
    // A bit an element, the lowest first: writes +0.0 where it is clear; and sets it where the element is not zero.
    void (*keep)(void* p, uint64_t n, const uint8_t* bits);
    void (*live)(const void* p, uint64_t n, uint8_t* bits);
    void (*prune_groups)(void* p, const Groups* groups, uint64_t first, uint64_t last, Tally* tally);  // columns first..last-1
};

struct Kernels {
    const char* name;
    WidthKernels width[4];  // elements of 1, 2, 4 and 8 bytes
};

extern const Kernels kernels_base;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace secateur
