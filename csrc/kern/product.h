// Products, written once for all vector instruction sets. Included by kernel objects alone: see table.h for the rules.
//
// A form C says how numbers are multiplied: Elem, Vec, step (elements in a Vec), zero, load, dot (acc + a · b, lane by
// lane), sum and sum4 (of the lanes of one and of four Vecs). A source S says how values are read: Value, and
// expand(values, mask), a Vec of C with the next values where the mask's bits are set and zeros elsewhere.
#pragma once

#include <cstdint>

#include "../product.h"

namespace {

using secateur::direct_inputs;
using secateur::Matrix;

constexpr int ahead = 4096;  // bytes of values that are asked for before they are needed

template <class M>
inline M mask_at(const uint8_t* bits) {
    M mask;
    __builtin_memcpy(&mask, bits, sizeof mask);
    return mask;
}

// One row with N inputs; U accumulators for each, so that additions need not wait for each other. Rows lie one behind the
// other and are read in that order: several at a time would be as many short streams, which are slower.
template <class S, int N, int U>
inline void direct_of(const Matrix* m, uint64_t row, const typename S::C::Elem* x, uint64_t stride, float* sums) {
    using C = typename S::C;
    const uint64_t padded = m->padded;
    const uint8_t* bits = static_cast<const uint8_t*>(m->where) + row * (padded / 8);
    const auto* values = static_cast<const typename S::Value*>(m->values) + m->starts[row];
    typename C::Vec acc[N][U];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) acc[i][u] = C::zero();
    for (uint64_t k = 0; k < padded; k += 64) {
#pragma GCC unroll 16
        for (int part = 0; part < 64 / C::step; ++part) {
            const auto mask = mask_at<typename S::Mask>(bits + (k + part * C::step) / 8);
            const typename C::Vec w = S::expand(values, mask);
            values += __builtin_popcount(mask);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i)
                acc[i][part % U] = C::dot(acc[i][part % U], w, C::load(x + i * stride + k + part * C::step));
        }
        __builtin_prefetch(reinterpret_cast<const char*>(values) + ahead);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        typename C::Vec all = acc[i][0];
#pragma GCC unroll 8
        for (int u = 1; u < U; ++u) all = C::add(all, acc[i][u]);
        sums[i] = C::sum(all);
    }
}

template <class S>
void direct(const Matrix* m, uint64_t row, const void* ptr, uint64_t stride, uint64_t n, float* sums) {
    const auto* x = static_cast<const typename S::C::Elem*>(ptr);
    constexpr int some = 64 / S::C::step < 4 ? 64 / S::C::step : 4;
    switch (n) {
        case 1: return direct_of<S, 1, some>(m, row, x, stride, sums);
        case 2: return direct_of<S, 2, 2>(m, row, x, stride, sums);
        case 3: return direct_of<S, 3, 2>(m, row, x, stride, sums);
        case 4: return direct_of<S, 4, 2>(m, row, x, stride, sums);
        case 5: return direct_of<S, 5, 1>(m, row, x, stride, sums);
        case 6: return direct_of<S, 6, 1>(m, row, x, stride, sums);
        case 7: return direct_of<S, 7, 1>(m, row, x, stride, sums);
        default: return direct_of<S, 8, 1>(m, row, x, stride, sums);
    }
}

template <class S>
uint64_t spread(const uint8_t* bits, const void* ptr, uint64_t columns, void* out) {
    using C = typename S::C;
    const auto* values = static_cast<const typename S::Value*>(ptr);
    const auto* begin = values;
    auto* to = static_cast<typename C::Elem*>(out);
    for (uint64_t k = 0; k < columns; k += C::step) {
        const auto mask = mask_at<typename S::Mask>(bits + k / 8);
        C::store(to + k, S::expand(values, mask));
        values += __builtin_popcount(mask);
        if (k % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(values) + ahead);
    }
    return static_cast<uint64_t>(values - begin);
}

template <class S>
void scatter(const uint16_t* columns, const void* ptr, uint64_t count, uint64_t base, void* out) {
    const auto* values = static_cast<const typename S::Value*>(ptr);
    auto* to = static_cast<typename S::C::Elem*>(out);
    for (uint64_t i = 0; i < count; ++i) to[columns[i] - base] = S::one(values[i]);
}

// Columns first … last - 1 of R rows and N inputs.
template <class C, int R, int N>
inline void tile_of(const typename C::Elem* w, uint64_t columns, uint64_t first, uint64_t last, const typename C::Elem* x,
                    uint64_t stride, float* sums, uint64_t n) {
    typename C::Vec acc[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) acc[r][i] = C::zero();
    for (uint64_t k = first; k < last; k += C::step) {
        typename C::Vec a[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) a[r] = C::load(w + r * columns + k);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            const typename C::Vec b = C::load(x + i * stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][i] = C::dot(acc[r][i], a[r], b);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        if constexpr (N == 4) {
            C::add_sums4(acc[r], sums + r * n);
        } else {
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sums[r * n + i] += C::sum(acc[r][i]);
        }
    }
}

constexpr uint64_t near_bytes = 4096;  // of a row, so that those of a tile and of its inputs lie in the first-level cache

template <class C, int R>
void tile(const void* weights, uint64_t rows, const void* inputs, uint64_t stride, uint64_t n, uint64_t columns, float* sums) {
    const auto* w = static_cast<const typename C::Elem*>(weights);
    const auto* x = static_cast<const typename C::Elem*>(inputs);
    constexpr uint64_t some = near_bytes / sizeof *w;
    for (uint64_t k = 0; k < columns; k += some) {
        const uint64_t end = k + some < columns ? k + some : columns;
        for (uint64_t r = 0; r < rows; r += R) {
            const auto* at = w + r * columns;
            float* to = sums + r * n;
            uint64_t i = 0;
            for (; i + 4 <= n; i += 4) tile_of<C, R, 4>(at, columns, k, end, x + i * stride, stride, to + i, n);
            switch (n - i) {
                case 1: tile_of<C, R, 1>(at, columns, k, end, x + i * stride, stride, to + i, n); break;
                case 2: tile_of<C, R, 2>(at, columns, k, end, x + i * stride, stride, to + i, n); break;
                case 3: tile_of<C, R, 3>(at, columns, k, end, x + i * stride, stride, to + i, n); break;
            }
        }
    }
}

// R rows and V panels of inputs: a vector holds one column, or pair, of many inputs, so that sums need no adding up across lanes.
template <class C, int R, int V>
inline void panel_of(const typename C::Elem* w, uint64_t columns, uint64_t first, uint64_t last, const typename C::Elem* x,
                     uint64_t stride, float* sums, uint64_t n) {
    constexpr uint64_t depth = sizeof(float) / sizeof *w, lanes = sizeof(typename C::Vec) / sizeof(float);
    typename C::Vec acc[R][V];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = C::zero();
    for (uint64_t k = first; k < last; k += depth) {
        typename C::Vec in[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) in[v] = C::load(x + v * stride + k * lanes);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
            const typename C::Vec a = C::repeated(w + r * columns + k);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = C::dot(acc[r][v], a, in[v]);
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) C::add_to(sums + r * n + v * lanes, acc[r][v]);
}

constexpr uint64_t panel_bytes = 2048;  // of a row, so that four panels of inputs lie in the second-level cache

template <class C, int R, int V>
inline void panels_of(const typename C::Elem* w, uint64_t rows, uint64_t columns, uint64_t first, uint64_t last,
                      const typename C::Elem* x, uint64_t stride, float* sums, uint64_t n) {
    for (uint64_t r = 0; r < rows; r += R) panel_of<C, R, V>(w + r * columns, columns, first, last, x, stride, sums + r * n, n);
}

// For a multiple of 12 rows: as many sums as there are registers for, or half of that for a panel alone.
template <class C>
void panel(const void* weights, uint64_t rows, const void* inputs, uint64_t stride, uint64_t panels, uint64_t columns,
           float* sums) {
    constexpr uint64_t lanes = sizeof(typename C::Vec) / sizeof(float);
    const auto* w = static_cast<const typename C::Elem*>(weights);
    constexpr uint64_t some = panel_bytes / sizeof *w;
    const uint64_t n = panels * lanes;
    for (uint64_t k = 0; k < columns; k += some) {
        const uint64_t end = k + some < columns ? k + some : columns;
        for (uint64_t i = 0; i < panels;) {
            const auto* x = static_cast<const typename C::Elem*>(inputs) + i * stride;
            float* to = sums + i * lanes;
            if (panels - i >= 4) {
                panels_of<C, 6, 4>(w, rows, columns, k, end, x, stride, to, n);
                i += 4;
            } else if (panels - i >= 2) {
                panels_of<C, 12, 2>(w, rows, columns, k, end, x, stride, to, n);
                i += 2;
            } else {
                panels_of<C, 12, 1>(w, rows, columns, k, end, x, stride, to, n);
                i += 1;
            }
        }
    }
}

// Inputs side by side, one vector of them or two: as floats, and as bf16 of which one vector holds two of floats.
template <class C, int V>
struct Wide {
    using Elem = float;
    static void load(const float* p, typename C::Vec* out) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) out[v] = C::load(p + v * C::step);
    }
    static void store(float* sums, const typename C::Vec* all) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) C::store(sums + v * C::step, all[v]);
    }
};

template <class C, int V>
struct Narrow {
    using Elem = uint16_t;
    static void load(const uint16_t* p, typename C::Vec* out) {
        if constexpr (V == 1) out[0] = C::from_bf16(p);
        else C::halves(p, out[0], out[1]);
    }
    static void store(float* sums, const typename C::Vec* all) {
        if constexpr (V == 1) C::store(sums, all[0]);
        else C::interleave(sums, all[0], all[1]);
    }
};

// U columns a turn, so that additions need not wait for each other.
template <class C, class P, int V, int U>
inline void skip_of(const uint16_t* columns, const float* values, uint64_t count, const void* inputs, float* sums) {
    const auto* x = static_cast<const typename P::Elem*>(inputs);
    typename C::Vec acc[U][V];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[u][v] = C::zero();
    const auto add = [&](uint64_t j, typename C::Vec* to) {
        typename C::Vec in[V];
        P::load(x + uint64_t{columns[j]} * (V * C::step), in);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) to[v] = C::dot(to[v], C::all(values[j]), in[v]);
    };
    uint64_t j = 0;
    for (; j + U <= count; j += U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) add(j + u, acc[u]);
    }
    for (; j < count; ++j) add(j, acc[0]);
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[0][v] = C::add(acc[0][v], acc[u][v]);
    P::store(sums, acc[0]);
}

template <class C, template <class, int> class P>
void skip(const uint16_t* columns, const float* values, uint64_t count, const void* x, int vectors, float* sums) {
    if (vectors == 1) skip_of<C, P<C, 1>, 1, 8>(columns, values, count, x, sums);
    else skip_of<C, P<C, 2>, 2, 4>(columns, values, count, x, sums);
}

template <class S>
void widen(const void* ptr, uint64_t count, float* out) {
    const auto* values = static_cast<const typename S::Value*>(ptr);
    for (uint64_t i = 0; i < count; i += S::Wide::step) S::Wide::store(out + i, S::wide(values + i));
}

inline uint64_t list_scalar(const uint8_t* bits, uint64_t columns, uint16_t* out) {
    uint16_t* to = out;
    for (uint64_t k = 0; k < columns; k += 64)
        for (uint64_t word = mask_at<uint64_t>(bits + k / 8); word; word &= word - 1)
            *to++ = static_cast<uint16_t>(k + static_cast<uint64_t>(__builtin_ctzll(word)));
    return static_cast<uint64_t>(to - out);
}

}  // namespace
