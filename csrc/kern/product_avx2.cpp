// AVX2: has no expansion, so a table of shuffles for every byte of a mask takes its place.
#include <immintrin.h>

#include "product.h"

namespace {

struct Floats {
    using Elem = float;
    using Vec = __m256;
    static constexpr int step = 8;
    static Vec zero() { return _mm256_setzero_ps(); }
    static Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
    static Vec all(float a) { return _mm256_set1_ps(a); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec dot(Vec acc, Vec a, Vec b) { return _mm256_fmadd_ps(a, b, acc); }
    static __m128 halved(Vec a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
    static float sum(Vec a) {
        const __m128 h = halved(a);
        const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
    }
    static Vec from_bf16(const uint16_t* p) {
        const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16));
    }
    static void halves(const uint16_t* p, Vec& even, Vec& odd) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }
    static void interleave(float* p, Vec even, Vec odd) {
        const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
        store(p, _mm256_permute2f128_ps(low, high, 0x20));
        store(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
    static void add_sums4(const Vec* a, float* sums) {
        const __m128 all = _mm_hadd_ps(_mm_hadd_ps(halved(a[0]), halved(a[1])), _mm_hadd_ps(halved(a[2]), halved(a[3])));
        _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), all));
    }
};

// For every byte of a mask, where each of 8 lanes takes its value from, in bytes of 16-bit values (0x80: zero), and which
// 32-bit value, and whether.
struct Shuffles {
    alignas(32) uint8_t of16[256][16];
    alignas(32) int32_t of32[256][8];
    alignas(32) int32_t live[256][8];
};

constexpr Shuffles made() {
    Shuffles s = {};
    for (int mask = 0; mask < 256; ++mask)
        for (int lane = 0, next = 0; lane < 8; ++lane) {
            const bool set = mask >> lane & 1;
            s.of16[mask][2 * lane] = static_cast<uint8_t>(set ? 2 * next : 0x80);
            s.of16[mask][2 * lane + 1] = static_cast<uint8_t>(set ? 2 * next + 1 : 0x80);
            s.of32[mask][lane] = set ? next : 0;
            s.live[mask][lane] = set ? -1 : 0;
            next += set;
        }
    return s;
}

constexpr Shuffles shuffles = made();

struct F32 {
    using C = Floats;
    using Wide = Floats;
    using Value = float;
    using Mask = uint8_t;
    static __m256 expand(const float* p, Mask m) {
        const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(shuffles.of32[m]));
        const __m256 live = _mm256_load_ps(reinterpret_cast<const float*>(shuffles.live[m]));
        return _mm256_and_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index), live);
    }
    static float one(float a) { return a; }
    static __m256 wide(const float* p) { return _mm256_loadu_ps(p); }
};

inline __m128i load8(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

inline __m128i expand8(const uint16_t* p, uint8_t m) {
    return _mm_shuffle_epi8(load8(p), _mm_load_si128(reinterpret_cast<const __m128i*>(shuffles.of16[m])));
}

struct BF16 {
    using C = Floats;
    using Wide = Floats;
    using Value = uint16_t;
    using Mask = uint8_t;
    static __m256 widened(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
    static __m256 expand(const Value* p, Mask m) { return widened(expand8(p, m)); }
    static float one(Value a) {
        const uint32_t bits = uint32_t{a} << 16;
        float out;
        __builtin_memcpy(&out, &bits, sizeof out);
        return out;
    }
    static __m256 wide(const Value* p) { return widened(load8(p)); }
};

struct F16 {
    using C = Floats;
    using Wide = Floats;
    using Value = uint16_t;
    using Mask = uint8_t;
    static __m256 expand(const Value* p, Mask m) { return _mm256_cvtph_ps(expand8(p, m)); }
    static float one(Value a) { return _cvtsh_ss(a); }
    static __m256 wide(const Value* p) { return _mm256_cvtph_ps(load8(p)); }
};

// Element by element: gathers of 8 are no faster than loads on most processors with AVX2.
template <class S>
float gather(const Matrix* m, uint64_t row, const float* x) {
    const auto* columns = static_cast<const uint16_t*>(m->where);
    const auto* values = static_cast<const typename S::Value*>(m->values);
    float sums[4] = {0, 0, 0, 0};
    int64_t j = m->starts[row];
    const int64_t end = m->starts[row + 1];
    for (; j + 4 <= end; j += 4)
        for (int u = 0; u < 4; ++u) sums[u] += S::one(values[j + u]) * x[columns[j + u]];
    for (; j < end; ++j) sums[0] += S::one(values[j]) * x[columns[j]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class S>
constexpr secateur::ValueKernels values_of() {
    return {false, direct<S>, gather<S>, spread<S>, scatter<S>, widen<S>, nullptr};
}

}  // namespace

const secateur::ProductKernels secateur::products_avx2 = {
    "avx2", 8, 24, 3, 1, 0, {values_of<F32>(), values_of<BF16>(), values_of<F16>()},
    {tile<Floats, 3>, nullptr}, {nullptr, nullptr}, {skip<Floats, Wide>, skip<Floats, Narrow>}, nullptr, nullptr, list_scalar,
};
