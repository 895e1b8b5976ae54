// Products with those pairs of bf16 that are not both zero. Included by kernel objects alone.
#pragma once

#include "product_avx512bf16.h"

namespace {

constexpr uint64_t near_columns = 128;  // whose inputs, of eight panels, lie in the first-level cache
constexpr uint64_t most_listed = 64;    // rows

// Pairs of a row that are not both zero, and where the inputs that they are multiplied with begin, in bytes.
struct Listed {
    uint32_t at[near_columns / 2 + 16];
    int32_t pair[near_columns / 2 + 16];
    uint64_t count;
};

inline void list_pairs(const uint16_t* w, uint64_t columns, Listed* out) {
    const __m512i first = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i at = _mm512_slli_epi32(first, 6);
    uint64_t count = 0;
    for (uint64_t k = 0; k < columns; k += 32) {
        const __m512i pairs = _mm512_loadu_si512(w + k);
        const __mmask16 some = _mm512_test_epi32_mask(pairs, pairs);
        _mm512_storeu_si512(out->pair + count, _mm512_mask_compress_epi32(fresh_zeros<__m512i>(), some, pairs));
        _mm512_storeu_si512(out->at + count, _mm512_mask_compress_epi32(fresh_zeros<__m512i>(), some, at));
        count += static_cast<uint64_t>(__builtin_popcount(some));
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16 << 6));
    }
    out->count = count;
}

// One row and V panels; U sums for each, so that additions need not wait for each other.
template <int V, int U>
inline void listed_of(const Listed* row, const uint16_t* x, uint64_t stride, float* sums) {
    __m512 acc[U][V];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[u][v] = u ? Floats::zero() : Floats::load(sums + v * Floats::step);
    const auto add = [&](uint64_t j, __m512* to) {
        const auto* in = reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(x) + row->at[j]);
        const __m512 a = _mm512_castsi512_ps(_mm512_set1_epi32(row->pair[j]));
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) to[v] = Pairs::dot(to[v], a, Pairs::load(in + static_cast<uint64_t>(v) * stride));
    };
    uint64_t j = 0;
    for (; j + U <= row->count; j += U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) add(j + u, acc[u]);
    }
    for (; j < row->count; ++j) add(j, acc[0]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
        for (int u = 1; u < U; ++u) acc[0][v] = Floats::add(acc[0][v], acc[u][v]);
        Floats::store(sums + v * Floats::step, acc[0][v]);
    }
}

template <int V, int U>
inline void listed_rows(const Listed* listed, uint64_t rows, const uint16_t* x, uint64_t stride, float* sums, uint64_t n) {
    for (uint64_t r = 0; r < rows; ++r) listed_of<V, U>(listed + r, x, stride, sums + r * n);
}

// Every pair costs a load of its inputs, which `panel` shares among rows: twice the time, for a pair that is there.
void skip_pairs(const void* weights, uint64_t rows, const void* inputs, uint64_t stride, uint64_t panels, uint64_t columns,
                float* sums) {
    const auto* w = static_cast<const uint16_t*>(weights);
    const uint64_t n = panels * Floats::step;
    Listed listed[most_listed];
    for (uint64_t k = 0; k < columns; k += near_columns) {
        const uint64_t some = columns - k < near_columns ? columns - k : near_columns;
        for (uint64_t r = 0; r < rows; ++r) list_pairs(w + r * columns + k, some, listed + r);
        for (uint64_t i = 0, taken; i < panels; i += taken) {
            const auto* x = static_cast<const uint16_t*>(inputs) + i * stride + k * Floats::step;
            float* to = sums + i * Floats::step;
            const uint64_t left = panels - i;
            taken = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            if (taken == 8) listed_rows<8, 1>(listed, rows, x, stride, to, n);
            else if (taken == 4) listed_rows<4, 2>(listed, rows, x, stride, to, n);
            else if (taken == 2) listed_rows<2, 4>(listed, rows, x, stride, to, n);
            else listed_rows<1, 8>(listed, rows, x, stride, to, n);
        }
    }
}

}  // namespace
