// Bindings of products. Python has checked every size: what the addresses hold is believed here.
#include "product_module.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace secateur {
namespace {

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

Matrix matrix_at(uintptr_t where, uintptr_t values, uintptr_t starts, uint64_t rows, uint64_t columns) {
    return {at(where), at(values), static_cast<const int64_t*>(at(starts)), rows, columns, (columns + 63) / 64 * 64};
}

void py_product(bool bitmask, int dtype, uintptr_t where, uintptr_t values, uintptr_t starts, uint64_t rows, uint64_t columns,
                uintptr_t x, uint64_t n, uintptr_t bias, uintptr_t y, int method) {
    const Matrix matrix = matrix_at(where, values, starts, rows, columns);
    const Product p{matrix, bitmask, static_cast<Dtype>(dtype), at(x), n, at(bias), at(y)};
    const nb::gil_scoped_release release;
    product(product_kernels(), p, static_cast<Method>(method));
}

void py_whole(bool bitmask, int dtype, uintptr_t where, uintptr_t values, uintptr_t starts, uint64_t rows, uint64_t columns,
              uint64_t first, uint64_t count, uintptr_t out) {
    const Matrix matrix = matrix_at(where, values, starts, rows, columns);
    const nb::gil_scoped_release release;
    make_whole(product_kernels(), matrix, bitmask, static_cast<Dtype>(dtype), first, count, at(out));
}

}  // namespace

void bind_products(nb::module_& m) {
    m.def("product_isa", [] { return product_kernels().name; });
    m.def("product_isas", &usable_product_isas);
    m.def("use_product_isa", &use_product_isa, "name"_a);
    m.def("product", &py_product, "bitmask"_a, "dtype"_a, "where"_a, "values"_a, "starts"_a, "rows"_a, "columns"_a, "x"_a,
          "n"_a, "bias"_a, "y"_a, "method"_a);
    m.def("whole", &py_whole, "bitmask"_a, "dtype"_a, "where"_a, "values"_a, "starts"_a, "rows"_a, "columns"_a, "first"_a,
          "count"_a, "out"_a);
    m.def("whole_is_bf16", [](int dtype) { return writes_bf16(product_kernels(), static_cast<Dtype>(dtype)); }, "dtype"_a);
    m.def("skips_pairs", [](int dtype) {
        const ProductKernels& k = product_kernels();
        return k.skip_pairs && k.of[dtype].pairs;
    }, "dtype"_a);
}

}  // namespace secateur
