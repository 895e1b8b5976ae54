// Products with a pruned matrix: what one instruction set offers, as a table of plain functions, and the driver's entry.
//
// A matrix lies in memory as secateur/core/layouts.py says. Kernels work on a few rows in the caller's thread; the driver
// (product.cpp) prepares the inputs, shares out the rows and rounds the results.
#pragma once

#include <cstdint>

namespace secateur {

enum Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {
    const void* where;      // bits, each row padded to 64 columns; or columns, 16 bits each
    const void* values;
    const int64_t* starts;  // rows + 1
    uint64_t rows, columns;
    uint64_t padded;        // columns, up to a multiple of 64
};

constexpr int direct_inputs = 8;    // inputs that `direct` takes at most
constexpr uint64_t padding = 64;    // elements that may be read beyond the last value

// Kernels of one dtype of values. `x` is floats, or bf16 where `pairs` says so, padded with zeros to 64 columns.
struct ValueKernels {
    bool pairs;
    // Bitmask: the sums of one row with n <= direct_inputs inputs.
    void (*direct)(const Matrix* m, uint64_t row, const void* x, uint64_t stride, uint64_t n, float* sums);
    // Columns: the sum of one row with one input of floats.
    float (*gather)(const Matrix* m, uint64_t row, const float* x);
    // Writes the columns of one row whose bits are `bits`, a multiple of 64, to `out`, in the form of `x`; returns how many
    // values that took.
    uint64_t (*spread)(const uint8_t* bits, const void* values, uint64_t columns, void* out);
    // The same of columns: values[i] goes to out[columns[i] - base].
    void (*scatter)(const uint16_t* columns, const void* values, uint64_t count, uint64_t base, void* out);
    void (*widen)(const void* values, uint64_t count, float* out);
    // Rounds 16 rows of 16 inputs, sums[r * stride + i] + bias[r], to y[i * y_stride + r]; bias may be null. Or null.
    void (*put)(const float* sums, uint64_t stride, const void* bias, void* y, uint64_t y_stride);
};

struct ProductKernels {
    const char* name;
    uint64_t lanes;       // floats in a vector
    uint64_t block_rows;  // rows whose weights are spread out at a time, a multiple of the next two
    uint64_t tile_rows;
    uint64_t panel_rows;
    uint64_t panel_from;  // inputs from which `panel` is used
    ValueKernels of[3];
    // Of floats, and of bf16 in pairs. The rows w are `columns` long, a multiple of 64.
    // sums[r * n + i] += w[r] · x[i], for a multiple of tile_rows; inputs lie `stride` elements apart.
    void (*tile[2])(const void* w, uint64_t rows, const void* x, uint64_t stride, uint64_t n, uint64_t columns, float* sums);
    // sums[r * panels * lanes + i] += w[r] · x[i], for a multiple of panel_rows; inputs in panels of `lanes`, which lie `stride`
    // elements apart: (columns, lanes), or in pairs (columns / 2, lanes, 2). Or null.
    void (*panel[2])(const void* w, uint64_t rows, const void* x, uint64_t stride, uint64_t panels, uint64_t columns, float* sums);
    // sums = Σ values[j] x[columns[j]] over `vectors`, 1 or 2, of inputs, x being (columns, vectors * lanes): of floats, and of
    // bf16.
    void (*skip[2])(const uint16_t* columns, const float* values, uint64_t count, const void* x, int vectors, float* sums);
    // As panel of bf16 in pairs, with the pairs that are not both zero, of at most 64 rows. Or null.
    void (*skip_pairs)(const void* w, uint64_t rows, const void* x, uint64_t stride, uint64_t panels, uint64_t columns, float* sums);
    // to[c * to_stride + r] = from[r * stride + c] of 16 rows of 16 elements of 32 bits. Or null.
    void (*turn)(const uint32_t* from, uint64_t stride, uint32_t* to, uint64_t to_stride);
    // Columns of the set bits, ascending; returns how many.
    uint64_t (*list)(const uint8_t* bits, uint64_t columns, uint16_t* out);
};

extern const ProductKernels products_base;
extern const ProductKernels products_avx2;
extern const ProductKernels products_avx512;
extern const ProductKernels products_avx512bf16;
extern const ProductKernels products_amx;

enum Method : int { by_direct = 0, by_skip = 1, by_tile = 2, by_pairs = 3 };

// y (n, rows) = x (n, columns) mᵀ + bias, all of one dtype and contiguous; bias may be null.
struct Product {
    Matrix matrix;
    bool bitmask;
    Dtype dtype;
    const void* x;
    uint64_t n;
    const void* bias;
    void* y;
};

void product(const ProductKernels& kernels, const Product& job, Method method);

// Some rows of a matrix with its zeros, (count, padded), for a dense product: in the form of `x`, bf16 if `writes_bf16` and
// else floats.
void make_whole(const ProductKernels& kernels, const Matrix& m, bool bitmask, Dtype dtype, uint64_t first, uint64_t count,
                void* out);
bool writes_bf16(const ProductKernels& kernels, Dtype dtype);

}  // namespace secateur
