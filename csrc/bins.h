// What LAMP asks of many tensors in one go, a tensor a thread: how many keys lie in each bin, and which lie in a window.
#pragma once

#include <cstdint>
#include <vector>

#include "drive.h"

namespace secateur {

// The bins key >> shift that occur in a tensor, ascending, and how often.
struct Bins {
    uint64_t zeros;  // keys that are 0, however wide the bins
    std::vector<int64_t> bins, counts;
};

std::vector<Bins> bins_of_each(const Kernels& kernels, const std::vector<Array>& arrays, int shift);

// The keys low … high that occur in a tensor of floats, ascending, how often, and the sum of rint(x * x * 2^scale_exp)
// over all that lie above.
struct Window {
    uint64_t low, high;
    int scale_exp;
};

struct Keys {
    std::vector<int64_t> keys, counts;
    uint64_t above;
};

std::vector<Keys> keys_of_each(const Kernels& kernels, const std::vector<Array>& arrays, const std::vector<Window>& windows);

}  // namespace secateur
