// What both AVX-512 objects share: floats, and values read with VBMI2. Included by kernel objects alone.
#pragma once

#include <immintrin.h>

#include "product.h"

namespace {

struct Floats {
    using Elem = float;
    using Vec = __m512;
    static constexpr int step = 16;
    static Vec zero() { return _mm512_setzero_ps(); }
    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
    static Vec all(float a) { return _mm512_set1_ps(a); }
    static Vec repeated(const float* p) { return _mm512_set1_ps(*p); }
    static void add_to(float* p, Vec a) { store(p, add(load(p), a)); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec dot(Vec acc, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, acc); }
    static float sum(Vec a) { return _mm512_reduce_add_ps(a); }
    static Vec from_bf16(const uint16_t* p) {
        const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
    }
    static void halves(const uint16_t* p, Vec& even, Vec& odd) {
        const __m512i both = _mm512_loadu_si512(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }
    static void interleave(float* p, Vec even, Vec odd) {
        const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        store(p, _mm512_permutex2var_ps(even, low, odd));
        store(p + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
    }
    static __m256 halved(Vec a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
    static void add_sums4(const Vec* a, float* sums) {
        const __m256 ab = _mm256_hadd_ps(halved(a[0]), halved(a[1])), cd = _mm256_hadd_ps(halved(a[2]), halved(a[3]));
        const __m256 abcd = _mm256_hadd_ps(ab, cd);
        const __m128 all = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
        _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), all));
    }
};

inline float bits_as_float(uint32_t bits) {
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
}

inline __m512 widened(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }

// The next values where the mask's bits are set, zeros elsewhere. The load is kept apart, since expanding from memory is
// microcoded on Zen; and the result goes over a register that was just cleared, since Zen waits for what was in it before.
template <class Vec>
inline Vec fresh_zeros() {
    Vec zeros;
    asm("vpxor %x0, %x0, %x0" : "=x"(zeros));
    return zeros;
}

template <class Vec>
inline Vec in_register(Vec a) {
    asm("" : "+v"(a));
    return a;
}

inline __m512 expand_floats(const float* p, uint16_t mask) {
    return _mm512_mask_expand_ps(fresh_zeros<__m512>(), mask, in_register(_mm512_loadu_ps(p)));
}

inline __m256i expand_words(const uint16_t* p, uint16_t mask) {
    const __m256i next = in_register(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm256_mask_expand_epi16(fresh_zeros<__m256i>(), mask, next);
}

inline __m256i rounded_bf16(__m512 a) {
    const __m512i bits = _mm512_castps_si512(a), high = _mm512_srli_epi32(bits, 16);
    const __m512i last = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), last), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(nearest, nan, high, _mm512_set1_epi32(0x40)));
}

struct F32 {
    using C = Floats;
    using Wide = Floats;
    using Value = float;
    using Mask = uint16_t;
    static __m512 expand(const float* p, Mask m) { return expand_floats(p, m); }
    static float one(float a) { return a; }
    static __m512 wide(const float* p) { return _mm512_loadu_ps(p); }
    static void round(__m512 a, float* p) { _mm512_storeu_ps(p, a); }
};

struct BF16 {
    using C = Floats;
    using Wide = Floats;
    using Value = uint16_t;
    using Mask = uint16_t;
    static __m256i load(const Value* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store(Value* p, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
    static __m512 expand(const Value* p, Mask m) { return widened(expand_words(p, m)); }
    static float one(Value a) { return bits_as_float(uint32_t{a} << 16); }
    static __m512 wide(const Value* p) { return widened(load(p)); }
    static void round(__m512 a, Value* p) { store(p, rounded_bf16(a)); }
};

struct F16 {
    using C = Floats;
    using Wide = Floats;
    using Value = uint16_t;
    using Mask = uint16_t;
    static __m512 expand(const Value* p, Mask m) {
        return _mm512_cvtph_ps(expand_words(p, m));
    }
    static float one(Value a) { return _cvtsh_ss(a); }
    static __m512 wide(const Value* p) { return _mm512_cvtph_ps(BF16::load(p)); }
    static void round(__m512 a, Value* p) { BF16::store(p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
};

// 16 by 16 sums, turned: shuffling the halves together once for every bit of an index exchanges rows and columns.
inline void turn(__m512* a) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 b[16];
#pragma GCC unroll 2
    for (int twice = 0; twice < 2; ++twice) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = _mm512_permutex2var_ps(a[i], low, a[i + 8]);
            b[2 * i + 1] = _mm512_permutex2var_ps(a[i], high, a[i + 8]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            a[2 * i] = _mm512_permutex2var_ps(b[i], low, b[i + 8]);
            a[2 * i + 1] = _mm512_permutex2var_ps(b[i], high, b[i + 8]);
        }
    }
}

void turn_square(const uint32_t* from, uint64_t stride, uint32_t* to, uint64_t to_stride) {
    __m512 a[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(from + r * stride);
    turn(a);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) _mm512_storeu_ps(to + c * to_stride, a[c]);
}

template <class S>
void put(const float* sums, uint64_t stride, const void* bias, void* out, uint64_t out_stride) {
    auto* y = static_cast<typename S::Value*>(out);
    const __m512 added = bias ? S::wide(static_cast<const typename S::Value*>(bias)) : _mm512_set1_ps(-0.0f);
    __m512 a[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(sums + r * stride);
    turn(a);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) S::round(_mm512_add_ps(a[i], added), y + i * out_stride);
}

// Whole vectors are read beyond the last value, whose columns belong to another row or to the padding.
template <class S>
float gather(const Matrix* m, uint64_t row, const float* x) {
    const auto* columns = static_cast<const uint16_t*>(m->where);
    const auto* values = static_cast<const typename S::Value*>(m->values);
    const auto input = [&](int64_t j) {
        const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + j));
        return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(at), x, 4);
    };
    int64_t j = m->starts[row];
    const int64_t end = m->starts[row + 1];
    __m512 a = _mm512_setzero_ps(), b = a;
    for (; j + 32 <= end; j += 32) {
        a = _mm512_fmadd_ps(S::wide(values + j), input(j), a);
        b = _mm512_fmadd_ps(S::wide(values + j + 16), input(j + 16), b);
    }
    for (; j < end; j += 16) {
        const auto mask = static_cast<__mmask16>(end - j < 16 ? (1u << (end - j)) - 1 : 0xFFFFu);
        a = _mm512_mask3_fmadd_ps(S::wide(values + j), input(j), a, mask);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
}

// Writes whole vectors: `out` has room for 32 columns more than there are.
uint64_t list(const uint8_t* bits, uint64_t columns, uint16_t* out) {
    alignas(64) static constexpr uint16_t first[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    __m512i at = _mm512_load_si512(first);
    uint16_t* to = out;
    for (uint64_t k = 0; k < columns; k += 32) {
        const auto mask = mask_at<uint32_t>(bits + k / 8);
        _mm512_storeu_si512(to, _mm512_mask_compress_epi16(fresh_zeros<__m512i>(), mask, at));
        to += __builtin_popcount(mask);
        at = _mm512_add_epi16(at, _mm512_set1_epi16(32));
    }
    return static_cast<uint64_t>(to - out);
}

template <class S>
constexpr secateur::ValueKernels values_of(bool pairs) {
    return {pairs, direct<S>, gather<S>, spread<S>, scatter<S>, widen<S>, put<S>};
}

}  // namespace
