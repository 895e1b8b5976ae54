// Bindings of packing. Python has checked every size: what the addresses hold is believed here.
#include "packing_module.h"

#include "packing.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace secateur {
namespace {

Array matrix(uintptr_t ptr, uint64_t rows, uint64_t columns, int width) {
    return {reinterpret_cast<void*>(ptr), rows * columns, width};
}

Bits bits_at(uintptr_t ptr, uint64_t rows, uint64_t columns) { return {reinterpret_cast<uint8_t*>(ptr), rows, columns}; }

int64_t* int64s(uintptr_t ptr) { return reinterpret_cast<int64_t*>(ptr); }

void py_mark(uintptr_t ptr, uint64_t rows, uint64_t columns, int width, uintptr_t bits) {
    const nb::gil_scoped_release release;
    mark(matrix(ptr, rows, columns, width), bits_at(bits, rows, columns));
}

void py_count_rows(uintptr_t bits, uint64_t rows, uint64_t columns, uintptr_t counts) {
    const nb::gil_scoped_release release;
    count_rows(bits_at(bits, rows, columns), int64s(counts));
}

void py_collect(uintptr_t ptr, uint64_t rows, uint64_t columns, int width, uintptr_t bits, uintptr_t starts,
                uintptr_t values) {
    const nb::gil_scoped_release release;
    collect(matrix(ptr, rows, columns, width), bits_at(bits, rows, columns), int64s(starts),
            reinterpret_cast<void*>(values));
}

void py_spread(uintptr_t ptr, uint64_t rows, uint64_t columns, int width, uintptr_t bits, uintptr_t starts,
               uintptr_t values) {
    const nb::gil_scoped_release release;
    spread(matrix(ptr, rows, columns, width), bits_at(bits, rows, columns), int64s(starts),
           reinterpret_cast<const void*>(values));
}

void py_list_columns(uintptr_t bits, uint64_t rows, uint64_t columns, uintptr_t starts, uintptr_t out) {
    const nb::gil_scoped_release release;
    list_columns(bits_at(bits, rows, columns), int64s(starts), reinterpret_cast<uint16_t*>(out));
}

}  // namespace

void bind_packing(nb::module_& m) {
    m.def("mark", &py_mark, "ptr"_a, "rows"_a, "columns"_a, "width"_a, "bits_ptr"_a);
    m.def("count_rows", &py_count_rows, "bits_ptr"_a, "rows"_a, "columns"_a, "counts_ptr"_a);
    m.def("collect", &py_collect, "ptr"_a, "rows"_a, "columns"_a, "width"_a, "bits_ptr"_a, "starts_ptr"_a,
          "values_ptr"_a);
    m.def("spread", &py_spread, "ptr"_a, "rows"_a, "columns"_a, "width"_a, "bits_ptr"_a, "starts_ptr"_a,
          "values_ptr"_a);
    m.def("list_columns", &py_list_columns, "bits_ptr"_a, "rows"_a, "columns"_a, "starts_ptr"_a, "out_ptr"_a);
}

}  // namespace secateur
