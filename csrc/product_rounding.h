// The way from sums, which are floats, to outputs: the bias is added, and the result rounded once, to nearest, half to even.
#pragma once

#include <cstdint>

#include "product.h"

namespace secateur {

class Rounding {
public:
    static constexpr uint64_t rows = 16;  // rows that are best put together: outputs of one input lie in one place

    Rounding(const ProductKernels& kernels, const Product& p) : p_(p), fast_(kernels.of[p.dtype].put) {}

    // sums[a * stride + b] is of row `row` + a and input `input` + b.
    void put(const float* sums, uint64_t stride, uint64_t row, uint64_t count, uint64_t input, uint64_t inputs) const;

private:
    template <class T>
    void put_as(const float* sums, uint64_t stride, uint64_t row, uint64_t count, uint64_t input, uint64_t inputs) const;

    const Product& p_;
    const decltype(ValueKernels::put) fast_;
};

}  // namespace secateur
