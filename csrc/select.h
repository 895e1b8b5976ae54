// Selection over many tensors in one go: the threads share out all of their elements, or the tensors themselves.
//
// A tensor of a million weights is read in a fraction of a millisecond; waking the threads for each of a hundred such
// tensors, and going back to Python in between, would cost as much again.
#pragma once

#include <cstdint>
#include <vector>

#include "drive.h"

namespace secateur {

// The cut behind the rank-th smallest of some (key, flat index), and what it does to one tensor.
struct Pick {
    bool found;          // false: the sample misled; the caller goes another way
    uint64_t cut_key;    // smaller keys go, and equal ones before cut_index
    uint64_t cut_index;
    uint64_t pruned;     // zeros included
    uint64_t least;      // the smallest key that survives, all ones in the width if none does
    uint64_t zeros;
    uint64_t max_key;
};

// The ranks[i] smallest of arrays[i], ranks[i] >= 1; or its zeros, where there are more.
std::vector<Pick> pick_each(const Kernels& kernels, const std::vector<Array>& arrays, const std::vector<uint64_t>& ranks);

// The rank >= 1 smallest of all arrays, which have one width; of equal keys those of earlier arrays first. Empty if the
// sample misled.
std::vector<Pick> pick_all(const Kernels& kernels, const std::vector<Array>& arrays, uint64_t rank);

// What `cut` of one tensor does, for each with a cut of its own.
std::vector<Tally> cut_each(const Kernels& kernels, const std::vector<Array>& arrays, const std::vector<uint64_t>& keys,
                            const std::vector<uint64_t>& indices, bool write);

}  // namespace secateur
