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
        static void clear(Key* p, Mask m) { _mm512_mask_storeu_epi##BITS(p, m, _mm512_setzero_si512()); }\
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

uint64_t squares_float(const void* ptr, uint64_t n, uint64_t over, double scale) {
    const float* p = static_cast<const float*>(ptr);
    const __m512d scales = _mm512_set1_pd(scale);
    const __m512i magnitude = _mm512_set1_epi32(max_key<uint32_t>), most = _mm512_set1_epi32(static_cast<int>(over));
    const auto terms = [&](__m256 some) {
        const __m512d x = _mm512_cvtps_pd(some);
        return _mm512_cvt_roundpd_epi64(_mm512_mul_pd(_mm512_mul_pd(x, x), scales),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    };
    __m512i sum = _mm512_setzero_si512(), other = sum;
    uint64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512 x = _mm512_loadu_ps(p + i);
        const uint32_t above = _mm512_cmpgt_epi32_mask(_mm512_and_si512(_mm512_castps_si512(x), magnitude), most);
        sum = _mm512_mask_add_epi64(sum, static_cast<__mmask8>(above), sum, terms(_mm512_castps512_ps256(x)));
        other = _mm512_mask_add_epi64(other, static_cast<__mmask8>(above >> 8), other, terms(_mm512_extractf32x8_ps(x, 1)));
    }
    const uint64_t vectors = static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(sum, other)));
    return vectors + squares_scalar(p + i, n - i, over, scale);
}

// Here a lane mask is what the bits are, so one is loaded or stored as it lies.
template <class V>
void keep_bits(void* ptr, uint64_t n, const uint8_t* bits) {
    auto* p = static_cast<typename V::Key*>(ptr);
    uint64_t i = 0;
#pragma GCC unroll 4
    for (; i + V::lanes <= n; i += V::lanes) {
        typename V::Mask kept;
        __builtin_memcpy(&kept, bits + i / 8, sizeof kept);
        V::clear(p + i, static_cast<typename V::Mask>(~kept));
    }
    keep_scalar<typename V::Key>(p + i, n - i, bits + i / 8);
}

template <class V>
void live_bits(const void* ptr, uint64_t n, uint8_t* bits) {
    const auto* p = static_cast<const typename V::Key*>(ptr);
    const auto magnitude = magnitude_bits<V>(), zero = V::set1(0);
    uint64_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) {
        const typename V::Mask live = V::gt(V::all_and(V::load(p + i), magnitude), zero);
        __builtin_memcpy(bits + i / 8, &live, sizeof live);
    }
    live_scalar<typename V::Key>(p + i, n - i, bits + i / 8);
}

template <class V>
constexpr secateur::WidthKernels with_masks(secateur::WidthKernels kernels) {
    kernels.keep = keep_bits<V>;
    kernels.live = live_bits<V>;
    return kernels;
}

}  // namespace

const secateur::Kernels secateur::kernels_avx512 = {
    "avx512",
    {with_masks<V1>(row<V1>(nullptr)), with_masks<V2>(row<V2>(nullptr)), with_masks<V4>(row<V4>(squares_float)),
     with_masks<V8>(row<V8>(nullptr))},
};
