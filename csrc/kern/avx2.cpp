// AVX2: lane masks are vectors of all-ones and zeros, and there is no compression.
#include <immintrin.h>

#include "groups.h"

namespace {

constexpr int rotation_limit = 32;

template <int GROUP, int SHIFT>
constexpr Lanes<uint8_t, 32> moved() {
    Lanes<uint8_t, 32> index = {};
    for (int i = 0; i < 32; ++i) index.lane[i] = uint8_t(i % 16 / GROUP * GROUP + (i + SHIFT) % GROUP);
    return index;
}

// Rotates every GROUP bytes down by SHIFT bytes.
template <int GROUP, int SHIFT>
inline __m256i rotated(__m256i x) {
    static_assert(GROUP <= rotation_limit && SHIFT < GROUP);
    if constexpr (GROUP < 16) {
        static constexpr auto index = moved<GROUP, SHIFT>();
        return _mm256_shuffle_epi8(x, _mm256_load_si256(reinterpret_cast<const __m256i*>(index.lane)));
    } else if constexpr (GROUP == 16) {
        return _mm256_alignr_epi8(x, x, SHIFT);
    } else {
        const __m256i halves = _mm256_permute2x128_si256(x, x, 1);
        if constexpr (SHIFT == 16) {
            return halves;
        } else if constexpr (SHIFT < 16) {
            return _mm256_alignr_epi8(halves, x, SHIFT);
        } else {
            return _mm256_alignr_epi8(x, halves, SHIFT - 16);
        }
    }
}

// A window of N lanes that starts N - n lanes in has all bits set from lane n on.
template <class Key, int N>
constexpr Lanes<Key, 2 * N> none_then_all() {
    Lanes<Key, 2 * N> window = {};
    for (int i = N; i < 2 * N; ++i) window.lane[i] = Key(-1);
    return window;
}

template <int N>
inline __m256i set_in_at_least(__m256i a, __m256i b, __m256i not_c) {
    const __m256i all = _mm256_and_si256(a, b), any = _mm256_or_si256(a, b);
    if constexpr (N == 1) return _mm256_or_si256(any, _mm256_xor_si256(not_c, _mm256_set1_epi32(-1)));
    if constexpr (N == 2) return _mm256_or_si256(all, _mm256_andnot_si256(not_c, any));
    return _mm256_andnot_si256(not_c, all);
}

// What AVX2 lacks for elements of 8 bytes.
inline __m256i set1_64(uint64_t a) { return _mm256_set1_epi64x(static_cast<long long>(a)); }

inline __m256i max_64(__m256i a, __m256i b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }

inline __m256i min_64(__m256i a, __m256i b) { return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b)); }

// The same operations for each width: little but the suffix of the instruction differs.
#define SECATEUR_VECTOR(NAME, KEY, BITS, SET1, MAX, MIN)                                                            \
    struct NAME {                                                                                                   \
        using Key = KEY;                                                                                            \
        using Reg = __m256i;                                                                                        \
        using Mask = __m256i;                                                                                       \
        static constexpr int lanes = 256 / BITS;                                                                    \
        static constexpr int longest_rotation = rotation_limit;                                                     \
        static Reg load(const Key* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }           \
        static void store(Key* p, Reg a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }                 \
        static Mask from(int n) {                                                                                   \
            static constexpr auto window = none_then_all<Key, lanes>();                                             \
            return load(window.lane + lanes - n);                                                                   \
        }                                                                                                           \
        static Reg set1(Key a) { return SET1(a); }                                                                  \
        static Reg all_and(Reg a, Reg b) { return _mm256_and_si256(a, b); }                                         \
        static Reg all_or(Reg a, Reg b) { return _mm256_or_si256(a, b); }                                           \
        static Reg all_not(Reg a) { return _mm256_xor_si256(a, _mm256_set1_epi32(-1)); }                            \
        static Reg add(Reg a, Reg b) { return _mm256_add_epi##BITS(a, b); }                                         \
        static Reg sub(Reg a, Reg b) { return _mm256_sub_epi##BITS(a, b); }                                         \
        static Reg max(Reg a, Reg b) { return MAX(a, b); }                                                          \
        static Mask gt(Reg a, Reg b) { return _mm256_cmpgt_epi##BITS(a, b); }                                       \
        static Mask eq(Reg a, Reg b) { return _mm256_cmpeq_epi##BITS(a, b); }                                       \
        static Mask negative(Reg a) { return gt(_mm256_setzero_si256(), a); }                                       \
        static uint32_t bytes(Mask m) { return static_cast<uint32_t>(_mm256_movemask_epi8(m)); }                    \
        static bool any(Reg a) { return !_mm256_testz_si256(a, a); }                                                \
        static uint64_t count(Mask m) { return static_cast<uint64_t>(__builtin_popcount(bytes(m))) / sizeof(Key); } \
        static Mask both(Mask a, Mask b) { return _mm256_and_si256(a, b); }                                         \
        static Mask without(Mask a, Mask b) { return _mm256_andnot_si256(b, a); }                                   \
        static Reg min_where(Reg a, Mask m, Reg b) {                                                                \
            return MIN(a, _mm256_blendv_epi8(a, b, m));                                                             \
        }                                                                                                           \
        static Reg add_where(Reg a, Mask m, Reg b) { return add(a, _mm256_and_si256(m, b)); }                       \
        static Reg keep(Mask m, Reg a) { return _mm256_and_si256(m, a); }                                           \
        static bool loses(Mask m, Reg a) { return !_mm256_testc_si256(m, a); }                                      \
        static uint64_t collect(Key* out, Mask m, Reg a) {                                                          \
            uint32_t left = bytes(m) & (~0u / ((1u << sizeof(Key)) - 1)); /* one bit a lane */                      \
            if (!left) return 0;                                                                                    \
            Key keys[lanes];                                                                                        \
            store(keys, a);                                                                                         \
            uint64_t n = 0;                                                                                         \
            for (; left; left &= left - 1) out[n++] = keys[__builtin_ctz(left) / sizeof(Key)];                      \
            return n;                                                                                               \
        }                                                                                                           \
        template <int N>                                                                                            \
        static Reg at_least(Reg a, Reg b, Reg not_c) {                                                              \
            return set_in_at_least<N>(a, b, not_c);                                                                 \
        }                                                                                                           \
        template <int GROUP, int SHIFT>                                                                             \
        static Reg rotate(Reg a) {                                                                                  \
            return rotated<GROUP, SHIFT>(a);                                                                        \
        }                                                                                                           \
    }

SECATEUR_VECTOR(V1, uint8_t, 8, _mm256_set1_epi8, _mm256_max_epi8, _mm256_min_epi8);
SECATEUR_VECTOR(V2, uint16_t, 16, _mm256_set1_epi16, _mm256_max_epi16, _mm256_min_epi16);
SECATEUR_VECTOR(V4, uint32_t, 32, _mm256_set1_epi32, _mm256_max_epi32, _mm256_min_epi32);
SECATEUR_VECTOR(V8, uint64_t, 64, set1_64, max_64, min_64);

}  // namespace

const secateur::Kernels secateur::kernels_avx2 = {
    "avx2",
    {row<V1>(nullptr), row<V2>(nullptr), row<V4>(squares_scalar), row<V8>(nullptr)},
};
