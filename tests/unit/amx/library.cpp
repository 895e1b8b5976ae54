// Products by the AMX kernels, as a function that Python can call.
#include "product.h"

extern "C" void amx_product(bool bitmask, int dtype, const void* where, const void* values, const int64_t* starts, uint64_t rows,
                            uint64_t columns, const void* x, uint64_t n, void* y, int method) {
    const secateur::Matrix m{where, values, starts, rows, columns, (columns + 63) / 64 * 64};
    const secateur::Product p{m, bitmask, static_cast<secateur::Dtype>(dtype), x, n, nullptr, y};
    secateur::product(secateur::products_amx, p, static_cast<secateur::Method>(method));
}
