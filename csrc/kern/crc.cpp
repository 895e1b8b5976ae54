// CRC-32 as zlib, PNG and gzip have it, 64 bytes at a time: V. Gopal et al., "Fast CRC Computation for Generic Polynomials
// Using PCLMULQDQ Instruction", Intel, 2009.
//
// Four 16-byte remainders are carried over the data side by side, then folded into one. What is left is as long as a
// remainder and congruent to all that came before, so its own CRC, and that of the tail, is taken byte by byte.
#include <emmintrin.h>
#include <wmmintrin.h>

#include "../crc.h"

namespace secateur {
namespace {

// x^n modulo the polynomial, bits reversed, for n = 512 + 32, 512 - 32, 128 + 32 and 128 - 32.
constexpr long long over_64_low = 0x154442bd4, over_64_high = 0x1c6e41596;
constexpr long long over_16_low = 0x1751997d0, over_16_high = 0x0ccaa009e;
constexpr uint32_t polynomial = 0xedb88320;

struct Table {
    uint32_t of[256];
};

constexpr Table table_of_bytes() {
    Table t{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? polynomial : 0);
        t.of[byte] = crc;
    }
    return t;
}

constexpr Table bytewise = table_of_bytes();

uint32_t one_by_one(const uint8_t* p, uint64_t n, uint32_t crc) {
    for (uint64_t i = 0; i < n; ++i) crc = crc >> 8 ^ bytewise.of[(crc ^ p[i]) & 255];
    return crc;
}

__m128i load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

__m128i carried(__m128i remainder, __m128i over, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(remainder, over, 0x00), high = _mm_clmulepi64_si128(remainder, over, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

}  // namespace

uint32_t crc32_clmul(const uint8_t* p, uint64_t n, uint32_t value) {
    uint32_t crc = ~value;
    if (n >= 64) {
        const __m128i over_64 = _mm_set_epi64x(over_64_high, over_64_low);
        const __m128i over_16 = _mm_set_epi64x(over_16_high, over_16_low);
        __m128i r0 = _mm_xor_si128(load(p), _mm_cvtsi32_si128(static_cast<int>(crc)));
        __m128i r1 = load(p + 16), r2 = load(p + 32), r3 = load(p + 48);
        for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
            r0 = carried(r0, over_64, load(p));
            r1 = carried(r1, over_64, load(p + 16));
            r2 = carried(r2, over_64, load(p + 32));
            r3 = carried(r3, over_64, load(p + 48));
        }
        r3 = carried(carried(carried(r0, over_16, r1), over_16, r2), over_16, r3);
        for (; n >= 16; p += 16, n -= 16) r3 = carried(r3, over_16, load(p));
        uint8_t left[16];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(left), r3);
        crc = one_by_one(left, 16, 0);
    }
    return ~one_by_one(p, n, crc);
}

}  // namespace secateur
