// The Python module secateur._native: addresses and integers in, integers out. Python has checked the tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bins.h"
#include "crc.h"
#include "drive.h"
#include "isa.h"
#include "packing_module.h"
#include "pool.h"
#include "product_module.h"
#include "select.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace secateur;

namespace {

Array array(uintptr_t ptr, uint64_t n, int width) { return {reinterpret_cast<void*>(ptr), n, width}; }

int64_t* int64s(uintptr_t ptr) { return reinterpret_cast<int64_t*>(ptr); }

// Without the interpreter's lock, so that other Python threads run meanwhile.
template <class F>
auto released(F work) {
    const nb::gil_scoped_release release;
    return work();
}

nb::tuple py_scan(uintptr_t ptr, uint64_t n, int width) {
    const Tally t = released([&] { return scan(kernels(), array(ptr, n, width)); });
    return nb::make_tuple(t.zeros, t.max_key);
}

nb::tuple py_bracket(uintptr_t ptr, uint64_t n, int width, uint64_t lo, uint64_t hi, uintptr_t out_ptr,
                     uint64_t out_cap) {
    const Tally t = released([&] {
        return bracket(kernels(), array(ptr, n, width), lo, hi, reinterpret_cast<void*>(out_ptr), out_cap);
    });
    return nb::make_tuple(t.below, static_cast<int64_t>(t.inside), t.zeros, t.max_key, t.min_above);
}

nb::tuple py_fill(uintptr_t ptr, uint64_t n, int width, uint64_t cut_key, uint64_t cut_index) {
    const Tally t = released([&] { return cut(kernels(), array(ptr, n, width), cut_key, cut_index, true); });
    return nb::make_tuple(t.below, t.min_above);
}

nb::tuple py_count(uintptr_t ptr, uint64_t n, int width, uint64_t cut_key, uint64_t cut_index) {
    const Tally t = released([&] { return cut(kernels(), array(ptr, n, width), cut_key, cut_index, false); });
    return nb::make_tuple(t.below, t.zeros, t.min_above, t.max_key);
}

void py_histogram(uintptr_t ptr, uint64_t n, int width, int shift, uint64_t prefix, uintptr_t bins_ptr,
                  uint64_t nbins) {
    released([&] { histogram(kernels(), array(ptr, n, width), shift, prefix, int64s(bins_ptr), nbins); });
}

int64_t py_tie_index(uintptr_t ptr, uint64_t n, int width, uint64_t key, uint64_t r) {
    return released([&] { return tie_index(kernels(), array(ptr, n, width), key, r); });
}

uint8_t* bytes_at(uintptr_t ptr) { return reinterpret_cast<uint8_t*>(ptr); }

uint32_t py_crc32(uintptr_t ptr, uint64_t n, uint32_t value) {
#ifdef SECATEUR_HAS_crc
    return released([&] { return crc32_clmul(bytes_at(ptr), n, value); });
#else
    throw std::runtime_error("this build has no CRC-32; ask has_clmul()");
#endif
}

void py_keep(uintptr_t ptr, uint64_t n, int width, uintptr_t bits_ptr) {
    released([&] { keep(kernels(), array(ptr, n, width), bytes_at(bits_ptr)); });
}

void py_live(uintptr_t ptr, uint64_t n, int width, uintptr_t bits_ptr) {
    released([&] { live(kernels(), array(ptr, n, width), bytes_at(bits_ptr)); });
}

nb::tuple py_nm(uintptr_t ptr, uint64_t outer, uint64_t groups, uint64_t of, uint64_t inner, uint64_t prune, int width,
                bool write) {
    const Tally t = released([&] {
        return prune_groups(kernels(), array(ptr, outer * groups * of * inner, width), {of, inner, prune, write});
    });
    return nb::make_tuple(t.below, t.zeros, t.min_above, t.max_key);
}

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<uint64_t>;

std::vector<Array> arrays_of(const Addresses& ptrs, const Sizes& sizes, const std::vector<int>& widths) {
    std::vector<Array> arrays;
    for (size_t i = 0; i < ptrs.size(); ++i) arrays.push_back(array(ptrs[i], sizes.at(i), widths.at(i)));
    return arrays;
}

void same_length(size_t a, size_t b) {
    if (a != b) throw std::invalid_argument("one of each for every tensor");
}

nb::list listed(const std::vector<Pick>& found) {
    nb::list out;
    for (const Pick& f : found) {
        if (f.found) out.append(nb::make_tuple(f.cut_key, f.cut_index, f.pruned, f.least, f.zeros, f.max_key));
        else out.append(nb::none());
    }
    return out;
}

nb::list py_pick_each(const Addresses& ptrs, const Sizes& sizes, const std::vector<int>& widths, const Sizes& ranks) {
    const std::vector<Array> arrays = arrays_of(ptrs, sizes, widths);
    same_length(ranks.size(), arrays.size());
    return listed(released([&] { return pick_each(kernels(), arrays, ranks); }));
}

nb::list py_pick_all(const Addresses& ptrs, const Sizes& sizes, const std::vector<int>& widths, uint64_t rank) {
    const std::vector<Array> arrays = arrays_of(ptrs, sizes, widths);
    for (const Array& a : arrays) same_length(a.width, arrays[0].width);
    return listed(released([&] { return pick_all(kernels(), arrays, rank); }));
}

nb::list py_cut_each(const Addresses& ptrs, const Sizes& sizes, const std::vector<int>& widths, const Sizes& keys,
                     const Sizes& indices, bool write) {
    const std::vector<Array> arrays = arrays_of(ptrs, sizes, widths);
    same_length(keys.size(), arrays.size());
    same_length(indices.size(), arrays.size());
    const std::vector<Tally> found = released([&] { return cut_each(kernels(), arrays, keys, indices, write); });
    nb::list out;
    for (const Tally& t : found) out.append(nb::make_tuple(t.below, t.zeros, t.min_above, t.max_key));
    return out;
}

nb::bytes bytes_of(const std::vector<int64_t>& values) {
    return nb::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

nb::list py_bins_of_each(const Addresses& ptrs, const Sizes& sizes, const std::vector<int>& widths, int shift) {
    const std::vector<Array> arrays = arrays_of(ptrs, sizes, widths);
    const std::vector<Bins> found = released([&] { return bins_of_each(kernels(), arrays, shift); });
    nb::list out;
    for (const Bins& f : found) out.append(nb::make_tuple(f.zeros, bytes_of(f.bins), bytes_of(f.counts)));
    return out;
}

nb::list py_keys_of_each(const Addresses& ptrs, const Sizes& sizes, const std::vector<int>& widths, const Sizes& lows,
                         const Sizes& highs, const std::vector<int>& scale_exps) {
    const std::vector<Array> arrays = arrays_of(ptrs, sizes, widths);
    same_length(lows.size(), arrays.size());
    std::vector<Window> windows;
    for (size_t i = 0; i < lows.size(); ++i) windows.push_back({lows[i], highs.at(i), scale_exps.at(i)});
    const std::vector<Keys> found = released([&] { return keys_of_each(kernels(), arrays, windows); });
    nb::list out;
    for (const Keys& f : found) out.append(nb::make_tuple(bytes_of(f.keys), bytes_of(f.counts), f.above));
    return out;
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("set_pool", &set_pool, "parallel_for"_a, "get_num_threads"_a);
    m.def("threads", &pool_size);
    m.def("isa", [] { return kernels().name; });
    m.def("isas", &usable_isas);
    m.def("use_isa", &use_isa, "name"_a);
    m.def("scan", &py_scan, "ptr"_a, "n"_a, "width"_a);
    m.def("bracket", &py_bracket, "ptr"_a, "n"_a, "width"_a, "lo"_a, "hi"_a, "out_ptr"_a, "out_cap"_a);
    m.def("fill", &py_fill, "ptr"_a, "n"_a, "width"_a, "cut_key"_a, "cut_index"_a);
    m.def("count", &py_count, "ptr"_a, "n"_a, "width"_a, "cut_key"_a, "cut_index"_a);
    m.def("histogram", &py_histogram, "ptr"_a, "n"_a, "width"_a, "shift"_a, "prefix"_a, "bins_ptr"_a, "nbins"_a);
    m.def("pick_each", &py_pick_each, "ptrs"_a, "sizes"_a, "widths"_a, "ranks"_a);
    m.def("pick_all", &py_pick_all, "ptrs"_a, "sizes"_a, "widths"_a, "rank"_a);
    m.def("cut_each", &py_cut_each, "ptrs"_a, "sizes"_a, "widths"_a, "keys"_a, "indices"_a, "write"_a);
    m.def("bins_of_each", &py_bins_of_each, "ptrs"_a, "sizes"_a, "widths"_a, "shift"_a);
    m.def("keys_of_each", &py_keys_of_each, "ptrs"_a, "sizes"_a, "widths"_a, "lows"_a, "highs"_a,
          "scale_exps"_a);
    m.def("tie_index", &py_tie_index, "ptr"_a, "n"_a, "width"_a, "key"_a, "r"_a);
    m.def("has_clmul", &has_clmul);
    m.def("crc32", &py_crc32, "ptr"_a, "n"_a, "value"_a);
    m.def("keep", &py_keep, "ptr"_a, "n"_a, "width"_a, "bits_ptr"_a);
    m.def("live", &py_live, "ptr"_a, "n"_a, "width"_a, "bits_ptr"_a);
    m.def("nm", &py_nm, "ptr"_a, "outer"_a, "groups"_a, "of"_a, "inner"_a, "prune"_a, "width"_a, "write"_a);
    bind_products(m);
    bind_packing(m);
}
