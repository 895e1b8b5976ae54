#include "scalar.h"

namespace {

template <class T>
constexpr secateur::WidthKernels scalar_row(uint64_t (*squares)(const void*, uint64_t, uint64_t, double)) {
    return {scan_scalar<T>,      bracket_scalar<T>,     count_scalar<T>, fill_scalar<T>,
            histogram_scalar<T>, count_equal_scalar<T>, squares,         keep_scalar<T>, live_scalar<T>,
            prune_groups_scalar<T>};
}

}  // namespace

const secateur::Kernels secateur::kernels_base = {
    "base",
    {scalar_row<uint8_t>(nullptr), scalar_row<uint16_t>(nullptr), scalar_row<uint32_t>(squares_scalar),
     scalar_row<uint64_t>(nullptr)},
};
