#include "scalar.h"

namespace {

template <class T>
constexpr secateur::WidthKernels scalar_row(void (*lamp)(const void*, uint64_t, int, double, LampBin*)) {
    return {scan_scalar<T>,      bracket_scalar<T>,     count_scalar<T>, fill_scalar<T>,
            histogram_scalar<T>, count_equal_scalar<T>, lamp,            prune_groups_scalar<T>};
}

}  // namespace

const secateur::Kernels secateur::kernels_base = {
    "base",
    {scalar_row<uint8_t>(nullptr), scalar_row<uint16_t>(nullptr), scalar_row<uint32_t>(lamp_scalar<uint32_t, float>),
     scalar_row<uint64_t>(lamp_scalar<uint64_t, double>)},
};
