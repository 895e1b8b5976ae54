#include "packing.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "pool.h"

namespace secateur {
namespace {

// Bytes of a matrix that a thread takes at a time.
constexpr uint64_t least_piece = 64 << 10;

uint64_t row_bytes(const Bits& bits) { return (bits.columns + 7) / 8; }

// row(r) for all rows, shared out among the threads; `bytes` is what one touches.
template <class Row>
void over_rows(uint64_t rows, uint64_t bytes, Row row) {
    const uint64_t least = std::max<uint64_t>(1, least_piece / std::max<uint64_t>(1, bytes));
    const auto workers = static_cast<unsigned>(std::clamp<uint64_t>(rows / least, 1, pool_size()));
    Pieces pieces(rows, least, 16 * least, workers);
    run(workers, [&](unsigned) {
        uint64_t begin, end;
        while (pieces.take(begin, end)) {
            for (uint64_t r = begin; r < end; ++r) row(r);
        }
    });
}

// step(word, column) for every 64 columns of a row, in order; bits past the last column come as zeros.
template <class Step>
void over_words(const Bits& bits, uint64_t r, Step step) {
    const uint8_t* row = bits.data + r * row_bytes(bits);
    for (uint64_t column = 0; column < bits.columns; column += 64) {
        const uint64_t left = bits.columns - column;
        uint64_t word = 0;
        for (uint64_t i = 0; i < std::min<uint64_t>(8, (left + 7) / 8); ++i) {
            word |= uint64_t{row[column / 8 + i]} << (8 * i);
        }
        if (left < 64) word &= (uint64_t{1} << left) - 1;
        step(word, column);
    }
}

// each(column) for every set bit of a row, in order.
template <class Each>
void over_set(const Bits& bits, uint64_t r, Each each) {
    over_words(bits, r, [&](uint64_t word, uint64_t column) {
        for (; word; word &= word - 1) each(column + static_cast<uint64_t>(__builtin_ctzll(word)));
    });
}

template <class T>
void mark_row(const T* p, const Bits& bits, uint64_t r) {
    uint8_t* row = bits.data + r * row_bytes(bits);
    uint64_t column = 0;
    for (; column + 8 <= bits.columns; column += 8) {
        unsigned byte = 0;
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) byte |= unsigned(p[column + j] != 0) << j;
        row[column / 8] = static_cast<uint8_t>(byte);
    }
    if (column == bits.columns) return;
    unsigned byte = 0;
    for (int j = 0; column + j < bits.columns; ++j) byte |= unsigned(p[column + j] != 0) << j;
    row[column / 8] = static_cast<uint8_t>(byte);
}

// row(p, r) with p the elements of row r, by their width.
template <class Row>
void over_matrix(const Array& a, const Bits& bits, Row row) {
    const auto typed = [&](auto* data) {
        over_rows(bits.rows, bits.columns * a.width, [=](uint64_t r) { row(data + r * bits.columns, r); });
    };
    switch (a.width) {
        case 2: return typed(static_cast<uint16_t*>(a.data));
        case 4: return typed(static_cast<uint32_t*>(a.data));
    }
    throw std::invalid_argument("matrices of elements of 2 or 4 bytes are packed");
}

}  // namespace

void mark(const Array& a, const Bits& bits) {
    over_matrix(a, bits, [&](const auto* p, uint64_t r) { mark_row(p, bits, r); });
}

void count_rows(const Bits& bits, int64_t* counts) {
    over_rows(bits.rows, row_bytes(bits), [&](uint64_t r) {
        int64_t count = 0;
        over_words(bits, r, [&](uint64_t word, uint64_t) { count += __builtin_popcountll(word); });
        counts[r] = count;
    });
}

void collect(const Array& a, const Bits& bits, const int64_t* starts, void* values) {
    over_matrix(a, bits, [&](const auto* p, uint64_t r) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
        T* out = static_cast<T*>(values) + starts[r];
        over_set(bits, r, [&](uint64_t column) { *out++ = p[column]; });
    });
}

void spread(const Array& a, const Bits& bits, const int64_t* starts, const void* values) {
    over_matrix(a, bits, [&](auto* p, uint64_t r) {
        using T = std::remove_pointer_t<decltype(p)>;
        const T* in = static_cast<const T*>(values) + starts[r];
        std::memset(p, 0, bits.columns * sizeof(T));
        over_set(bits, r, [&](uint64_t column) { p[column] = *in++; });
    });
}

void list_columns(const Bits& bits, const int64_t* starts, uint16_t* out) {
    over_rows(bits.rows, row_bytes(bits), [&](uint64_t r) {
        uint16_t* row = out + starts[r];
        over_set(bits, r, [&](uint64_t column) { *row++ = static_cast<uint16_t>(column); });
    });
}

}  // namespace secateur
