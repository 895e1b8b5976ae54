// The k-th smallest key of each of many tensors: the tensors are shared out among the threads, not their elements.
//
// A tensor of a million weights is read in a fraction of a millisecond; waking the threads for each of a hundred such
// tensors, and going back to Python in between, would cost as much again.
#pragma once

#include <cstdint>
#include <vector>

#include "drive.h"

namespace secateur {

struct Kth {
    bool found;         // false: the sample misled; the caller goes another way
    uint64_t key;       // the rank-th smallest; 0 if no more than the zeros are asked for
    uint64_t below;     // how many keys are smaller
    uint64_t ties;      // how many are equal
    uint64_t above;     // the smallest larger key, all ones in the width if there is none
    uint64_t zeros;
    uint64_t max_key;
};

// ranks[i] >= 1 counts from the smallest key of arrays[i].
std::vector<Kth> kth_of_each(const Kernels& kernels, const std::vector<Array>& arrays,
                             const std::vector<uint64_t>& ranks);

}  // namespace secateur
