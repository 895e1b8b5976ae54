// Selection over many tensors in one go: the threads share out all of their elements, or the tensors themselves.
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
    uint64_t below;     // how many keys of this tensor are smaller
    uint64_t ties;      // how many are equal
    uint64_t above;     // the smallest larger key, all ones in the width if there is none
    uint64_t zeros;
    uint64_t max_key;
};

// ranks[i] >= 1 counts from the smallest key of arrays[i].
std::vector<Kth> kth_of_each(const Kernels& kernels, const std::vector<Array>& arrays,
                             const std::vector<uint64_t>& ranks);

// rank >= 1 counts from the smallest key of all arrays, which have one width; empty if the sample misled.
std::vector<Kth> kth_of_all(const Kernels& kernels, const std::vector<Array>& arrays, uint64_t rank);

// What `cut` of one tensor does, for each with a cut of its own.
std::vector<Tally> cut_each(const Kernels& kernels, const std::vector<Array>& arrays, const std::vector<uint64_t>& keys,
                            const std::vector<uint64_t>& indices, bool write);

// One bin of keys that occurs in a tensor.
struct Bin {
    int64_t bin, count, sum;
};

struct Bins {
    uint64_t zeros, max_key;
    int scale_exp;
    std::vector<Bin> bins;
};

// Bins key >> shift of each tensor, with sums of rint(x * x * 2^scale_exp) for widths 4 and 8 (else 0); scale_exp is
// room - 2 e, where e is the binary exponent of the tensor's largest magnitude: |x| < 2^e.
std::vector<Bins> bins_of_each(const Kernels& kernels, const std::vector<Array>& arrays, int shift,
                               const std::vector<int>& room);

}  // namespace secateur
