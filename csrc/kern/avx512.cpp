// AVX-512 with VBMI2 (Ice Lake, Zen 4 and later): the first whose compression reaches elements of 1 and 2 bytes.
#include <immintrin.h>

#include "groups.h"

namespace {

constexpr int rotation_limit = 64;

// Of each 64 bytes the index, in units of U bytes, of the one that moves here.
template <class U, int GROUP, int SHIFT>
constexpr Lanes<U, 64 / sizeof(U)> moved() {
    Lanes<U, 64 / sizeof(U)> index = {};
    constexpr int group = GROUP / sizeof(U), shift = SHIFT / sizeof(U);
    constexpr int lanes = 64 / sizeof(U);
    for (int i = 0; i < lanes; ++i) index.lane[i] = U(i / group * group + (i + shift) % group);
    return index;
}

// Rotates every GROUP bytes down by SHIFT bytes.
template <int GROUP, int SHIFT>
inline __m512i rotated(__m512i x) {
    static_assert(GROUP <= rotation_limit && SHIFT < GROUP);
    if constexpr (GROUP == 2) {
        return _mm512_shldi_epi16(x, x, 8);
    } else if constexpr (GROUP == 4) {
        return _mm512_ror_epi32(x, 8 * SHIFT);
    } else if constexpr (GROUP == 8) {
        return _mm512_ror_epi64(x, 8 * SHIFT);
    } else if constexpr (GROUP == 16) {
        return _mm512_alignr_epi8(x, x, SHIFT);
    } else if constexpr (SHIFT % 4) {
        static constexpr auto index = moved<uint16_t, GROUP, SHIFT>();
        return _mm512_permutexvar_epi16(_mm512_load_si512(index.lane), x);
    } else {
        static constexpr auto index = moved<uint32_t, GROUP, SHIFT>();
        return _mm512_permutexvar_epi32(_mm512_load_si512(index.lane), x);
    }
}

// The same operations for each width: only the suffix of the instruction differs.
#define SECATEUR_VECTOR(NAME, KEY, MASK, BITS, LANES)                                                \
    struct NAME {                                                                                    \
        using Key = KEY;                                                                             \
        using Reg = __m512i;                                                                         \
        using Mask = MASK;                                                                           \
        static constexpr int lanes = LANES;                                                          \
        static constexpr int longest_rotation = rotation_limit;                                      \
        static Reg load(const Key* p) { return _mm512_loadu_si512(p); }                              \
        static void store(Key* p, Reg a) { _mm512_storeu_si512(p, a); }                              \
        static Mask from(int n) { return static_cast<Mask>(~uint64_t{0} << n); }                     \
        static Reg set1(Key a) { return _mm512_set1_epi##BITS(a); }                                  \
        static Reg all_and(Reg a, Reg b) { return _mm512_and_si512(a, b); }                          \
        static Reg all_or(Reg a, Reg b) { return _mm512_or_si512(a, b); }                            \
        static Reg all_not(Reg a) { return _mm512_ternarylogic_epi32(a, a, a, 0x0F); }               \
        static Reg add(Reg a, Reg b) { return _mm512_add_epi##BITS(a, b); }                          \
        static Reg sub(Reg a, Reg b) { return _mm512_sub_epi##BITS(a, b); }                          \
        static Reg max(Reg a, Reg b) { return _mm512_max_epi##BITS(a, b); }                          \
        static Mask gt(Reg a, Reg b) { return _mm512_cmpgt_epi##BITS##_mask(a, b); }                 \
        static Mask eq(Reg a, Reg b) { return _mm512_cmpeq_epi##BITS##_mask(a, b); }                 \
        static Mask negative(Reg a) { return _mm512_movepi##BITS##_mask(a); }                        \
        static bool any(Reg a) { return _mm512_test_epi64_mask(a, a) != 0; }                         \
        static uint64_t count(Mask m) { return static_cast<uint64_t>(__builtin_popcountll(m)); }     \
        static Mask both(Mask a, Mask b) { return _kand_mask##LANES(a, b); }                         \
        static Mask without(Mask a, Mask b) { return _kandn_mask##LANES(b, a); }                     \
        static Reg min_where(Reg a, Mask m, Reg b) { return _mm512_mask_min_epi##BITS(a, m, a, b); } \
        static Reg add_where(Reg a, Mask m, Reg b) { return _mm512_mask_add_epi##BITS(a, m, a, b); } \
        static Reg keep(Mask m, Reg a) { return _mm512_maskz_mov_epi##BITS(m, a); }                  \
        static bool loses(Mask m, Reg a) {                                                           \
            return _mm512_mask_test_epi##BITS##_mask(static_cast<Mask>(~m), a, a) != 0;              \
        }                                                                                            \
        /* Through a register: compressing straight to memory is microcoded on Zen 4. */             \
        static uint64_t collect(Key* out, Mask m, Reg a) {                                           \
            store(out, _mm512_maskz_compress_epi##BITS(m, a));                                       \
            return count(m);                                                                         \
        }                                                                                            \
        template <int N>                                                                             \
        static Reg at_least(Reg a, Reg b, Reg not_c) {                                               \
            return _mm512_ternarylogic_epi32(a, b, not_c, N == 1 ? 0xFD : N == 2 ? 0xD4 : 0x40);     \
        }                                                                                            \
        template <int GROUP, int SHIFT>                                                              \
        static Reg rotate(Reg a) {                                                                   \
            return rotated<GROUP, SHIFT>(a);                                                         \
        }                                                                                            \
    }

SECATEUR_VECTOR(V1, uint8_t, __mmask64, 8, 64);
SECATEUR_VECTOR(V2, uint16_t, __mmask32, 16, 32);
SECATEUR_VECTOR(V4, uint32_t, __mmask16, 32, 16);
SECATEUR_VECTOR(V8, uint64_t, __mmask8, 64, 8);

inline void add_pair(LampBin* bin, __m128i one_and_term) {
    __m128i* at = reinterpret_cast<__m128i*>(bin);
    _mm_storeu_si128(at, _mm_add_epi64(_mm_loadu_si128(at), one_and_term));
}

// The bin of each element comes from the element itself, not from a vector: that saves the way through memory.
void lamp_float(const void* ptr, uint64_t n, int shift, double scale, LampBin* bins) {
    const float* p = static_cast<const float*>(ptr);
    const __m512d scales = _mm512_set1_pd(scale);
    const __m512i one = _mm512_set1_epi64(1);
    const uint64_t mask = max_key<uint32_t> >> shift;
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const auto bin = [&](int j) {
            uint64_t two;
            __builtin_memcpy(&two, p + i + j / 2 * 2, sizeof two);
            return bins + ((two >> (j % 2 * 32 + shift)) & mask);
        };
        const __m512d x = _mm512_cvtps_pd(_mm256_loadu_ps(p + i));
        const __m512i term = _mm512_cvt_roundpd_epi64(_mm512_mul_pd(_mm512_mul_pd(x, x), scales),
                                                      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512i even = _mm512_unpacklo_epi64(one, term), odd = _mm512_unpackhi_epi64(one, term);
        add_pair(bin(0), _mm512_castsi512_si128(even));
        add_pair(bin(1), _mm512_castsi512_si128(odd));
        add_pair(bin(2), _mm512_extracti64x2_epi64(even, 1));
        add_pair(bin(3), _mm512_extracti64x2_epi64(odd, 1));
        add_pair(bin(4), _mm512_extracti64x2_epi64(even, 2));
        add_pair(bin(5), _mm512_extracti64x2_epi64(odd, 2));
        add_pair(bin(6), _mm512_extracti64x2_epi64(even, 3));
        add_pair(bin(7), _mm512_extracti64x2_epi64(odd, 3));
    }
    lamp_scalar<uint32_t, float>(p + i, n - i, shift, scale, bins);
}

}  // namespace

const secateur::Kernels secateur::kernels_avx512 = {
    "avx512",
    {row<V1>(nullptr), row<V2>(nullptr), row<V4>(lamp_float), row<V8>(lamp_scalar<uint64_t, double>)},
};
