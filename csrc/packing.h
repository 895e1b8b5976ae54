// A matrix as bits and values: row after row, a bit where an element is stored, which is where its bits are not all zero.
//
// A row has ceil(columns / 8) bytes of bits, the lowest bit of a byte first; bits past the last column are never read.
// `starts` says for each row where its values begin, rows + 1 of them, as the bits count.
#pragma once

#include <cstdint>

#include "drive.h"

namespace secateur {

struct Bits {
    uint8_t* data;
    uint64_t rows, columns;
};

// Sets the bits of what is stored in the matrix `a`, and clears all others.
void mark(const Array& a, const Bits& bits);

// How many bits of each row are set.
void count_rows(const Bits& bits, int64_t* counts);

// Writes the elements of `a` whose bits are set to `values`, one beside the other.
void collect(const Array& a, const Bits& bits, const int64_t* starts, void* values);

// The way back: writes all of `a`, zeros where a bit is clear.
void spread(const Array& a, const Bits& bits, const int64_t* starts, const void* values);

// Writes the column of every set bit; at most 65,536 columns.
void list_columns(const Bits& bits, const int64_t* starts, uint16_t* out);

}  // namespace secateur
