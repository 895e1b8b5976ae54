// The tiles of AMX as a program, for processors that have none: what the manual says each instruction does.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace {

struct Tile {
    int rows, bytes;
    uint8_t data[16][64];
};

thread_local Tile emulated[8];
thread_local bool configured = false;

inline Tile& tile_at(int i) {
    if (!configured || !emulated[i].rows) std::abort();
    return emulated[i];
}

inline void _tile_loadconfig(const void* config) {
    const auto* bytes = static_cast<const uint8_t*>(config);
    if (bytes[0] != 1 || bytes[1] != 0) std::abort();
    for (int i = 2; i < 16; ++i)
        if (bytes[i]) std::abort();
    for (int i = 0; i < 8; ++i) {
        uint16_t width;
        std::memcpy(&width, bytes + 16 + 2 * i, 2);
        if (width > 64 || bytes[48 + i] > 16) std::abort();
        emulated[i] = {bytes[48 + i], width, {}};
    }
    for (int i = 32; i < 64; ++i)
        if ((i < 48 || i >= 56) && bytes[i]) std::abort();
    configured = true;
}

inline void _tile_release() { configured = false; }

inline void _tile_zero(int i) { std::memset(tile_at(i).data, 0, sizeof emulated[i].data); }

inline void _tile_loadd(int i, const void* from, uint64_t stride) {
    Tile& t = tile_at(i);
    std::memset(t.data, 0, sizeof t.data);
    for (int r = 0; r < t.rows; ++r) std::memcpy(t.data[r], static_cast<const char*>(from) + r * stride, t.bytes);
}

inline void _tile_stored(int i, void* to, uint64_t stride) {
    const Tile& t = tile_at(i);
    for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, t.data[r], t.bytes);
}

inline float wide_bf16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    const uint32_t bits = uint32_t{value} << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void _tile_dpbf16ps(int sums, int left, int right) {
    Tile &c = tile_at(sums), &a = tile_at(left), &b = tile_at(right);
    if (a.bytes / 4 != b.rows || c.rows != a.rows || c.bytes != b.bytes) std::abort();
    for (int m = 0; m < c.rows; ++m)
        for (int n = 0; n < c.bytes / 4; ++n) {
            float sum;
            std::memcpy(&sum, c.data[m] + 4 * n, 4);
            for (int k = 0; k < b.rows; ++k)
                for (int half = 0; half < 2; ++half)
                    sum += wide_bf16(a.data[m] + 4 * k + 2 * half) * wide_bf16(b.data[k] + 4 * n + 2 * half);
            std::memcpy(c.data[m] + 4 * n, &sum, 4);
        }
}

}  // namespace
