// AMX: tiles of 16 rows by 32 columns of bf16. Everything but the tiles is as with AVX-512.
#include "product_avx512bf16.h"

// A test on a processor without AMX puts a program in its place.
#ifdef SECATEUR_AMX_EMULATOR
#include SECATEUR_AMX_EMULATOR
#endif

namespace {

constexpr uint64_t side = 16;   // rows, and inputs, of a tile
constexpr uint64_t depth = 32;  // columns

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig config = {};

// Tiles 0 to 3 are sums, 4 and 5 rows of weights, 6 and 7 inputs. Two of each share what they load.
template <int R, int N>
inline void products(const uint16_t* w, uint64_t row_bytes, const uint16_t* x, uint64_t stride, uint64_t columns, float* sums,
                     uint64_t n) {
    const uint64_t sum_bytes = n * sizeof(float);
    _tile_loadd(0, sums, sum_bytes);
    if constexpr (N == 2) _tile_loadd(1, sums + side, sum_bytes);
    if constexpr (R == 2) _tile_loadd(2, sums + side * n, sum_bytes);
    if constexpr (R == 2 && N == 2) _tile_loadd(3, sums + side * n + side, sum_bytes);
    for (uint64_t k = 0; k < columns; k += depth) {
        _tile_loadd(4, w + k, row_bytes);
        if constexpr (R == 2) _tile_loadd(5, w + k + side * row_bytes / sizeof *w, row_bytes);
        _tile_loadd(6, x + k * side, 64);
        if constexpr (N == 2) _tile_loadd(7, x + k * side + stride, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (R == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, sum_bytes);
    if constexpr (N == 2) _tile_stored(1, sums + side, sum_bytes);
    if constexpr (R == 2) _tile_stored(2, sums + side * n, sum_bytes);
    if constexpr (R == 2 && N == 2) _tile_stored(3, sums + side * n + side, sum_bytes);
}

void panel_amx(const void* weights, uint64_t rows, const void* inputs, uint64_t stride, uint64_t panels, uint64_t columns,
               float* sums) {
    const uint64_t row_bytes = columns * sizeof(uint16_t), n = panels * side;
    _tile_loadconfig(&config);
    for (uint64_t i = 0; i < panels; i += 2)
        for (uint64_t r = 0; r < rows; r += 2 * side) {
            const auto* w = static_cast<const uint16_t*>(weights) + r * columns;
            const auto* x = static_cast<const uint16_t*>(inputs) + i * stride;
            float* to = sums + r * n + i * side;
            const bool more_rows = r + side < rows, more_inputs = i + 1 < panels;
            if (more_rows && more_inputs) products<2, 2>(w, row_bytes, x, stride, columns, to, n);
            else if (more_rows) products<2, 1>(w, row_bytes, x, stride, columns, to, n);
            else if (more_inputs) products<1, 2>(w, row_bytes, x, stride, columns, to, n);
            else products<1, 1>(w, row_bytes, x, stride, columns, to, n);
        }
    _tile_release();
}

}  // namespace

const secateur::ProductKernels secateur::products_amx = {
    "amx", 16, 32, 4, 16, 5, {values_of<F32>(false), values_of<BF16Pairs>(true), values_of<F16>(false)},
    {tile<Floats, 4>, tile<Pairs, 4>}, {nullptr, panel_amx}, {skip<Floats, Wide>, skip<Floats, Narrow>}, nullptr, turn_square, list,
};
