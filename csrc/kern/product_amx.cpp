// AMX: tiles of 16 rows by 32 columns of bf16. Everything but the tiles is as with AVX-512.
#include "product_avx512bf16.h"

// A test on a processor without AMX puts a program in its place.
#ifdef SECATEUR_AMX_EMULATOR
#include SECATEUR_AMX_EMULATOR
#endif

namespace {

constexpr uint64_t side = 16;   // rows, and inputs, of a tile
constexpr uint64_t depth = 32;  // columns
constexpr uint64_t tile_floats = side * side;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig config = {};

// Tiles 0 to 3 are sums, 4 and 5 rows of weights, 6 and 7 inputs. Two of each share what they load.
template <int R, int N>
inline void products(const uint16_t* w, uint64_t row_bytes, const uint16_t* x, uint64_t panel, uint64_t columns, float* sums) {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && N == 2) _tile_zero(3);
    for (uint64_t k = 0; k < columns; k += depth) {
        _tile_loadd(4, w + k, row_bytes);
        if constexpr (R == 2) _tile_loadd(5, w + k + side * row_bytes / sizeof *w, row_bytes);
        _tile_loadd(6, x + k * side, 64);
        if constexpr (N == 2) _tile_loadd(7, x + k * side + panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (R == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    if constexpr (N == 2) _tile_stored(1, sums + tile_floats, 64);
    if constexpr (R == 2) _tile_stored(2, sums + 2 * tile_floats, 64);
    if constexpr (R == 2 && N == 2) _tile_stored(3, sums + 3 * tile_floats, 64);
}

inline void add_tile(const float* tile, float* sums, uint64_t n, uint64_t inputs) {
    const auto mask = static_cast<__mmask16>(inputs < side ? (1u << inputs) - 1 : 0xFFFFu);
    for (uint64_t r = 0; r < side; ++r) {
        const __m512 before = _mm512_maskz_loadu_ps(mask, sums + r * n);
        _mm512_mask_storeu_ps(sums + r * n, mask, _mm512_add_ps(before, _mm512_load_ps(tile + r * side)));
    }
}

// Inputs come in panels of 16, of which a row holds two columns of each.
void tile_amx(const void* weights, uint64_t rows, const void* inputs, uint64_t stride, uint64_t n, uint64_t columns,
              float* sums) {
    alignas(64) float tiles[4 * tile_floats];
    const uint64_t row_bytes = columns * sizeof(uint16_t), panel = stride * side;
    _tile_loadconfig(&config);
    for (uint64_t i = 0; i < n; i += 2 * side)
        for (uint64_t r = 0; r < rows; r += 2 * side) {
            const auto* w = static_cast<const uint16_t*>(weights) + r * columns;
            const auto* x = static_cast<const uint16_t*>(inputs) + i / side * panel;
            const bool more_rows = r + side < rows, more_inputs = i + side < n;
            if (more_rows && more_inputs) products<2, 2>(w, row_bytes, x, panel, columns, tiles);
            else if (more_rows) products<2, 1>(w, row_bytes, x, panel, columns, tiles);
            else if (more_inputs) products<1, 2>(w, row_bytes, x, panel, columns, tiles);
            else products<1, 1>(w, row_bytes, x, panel, columns, tiles);
            for (uint64_t a = 0; a < (more_rows ? 2u : 1u); ++a)
                for (uint64_t b = 0; b < (more_inputs ? 2u : 1u); ++b)
                    add_tile(tiles + (2 * a + b) * tile_floats, sums + (r + a * side) * n + i + b * side, n, n - i - b * side);
        }
    _tile_release();
}

}  // namespace

const secateur::ProductKernels secateur::products_amx = {
    "amx", 16, 32, 16, true, {values_of<F32>(false), values_of<BF16Pairs>(true), values_of<F16>(false)},
    {tile<Floats, 4>, tile_amx}, {skip<Floats, Wide>, skip<Floats, Narrow>}, list,
};
