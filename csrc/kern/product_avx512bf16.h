// bf16 that are multiplied in pairs. Included by kernel objects alone.
#pragma once

#include "product_avx512.h"

namespace {

struct Pairs : Floats {
    using Elem = uint16_t;
    static constexpr int step = 32;
    static __m512 load(const uint16_t* p) { return _mm512_loadu_ps(p); }
    static void store(uint16_t* p, __m512 a) { _mm512_storeu_ps(p, a); }
    static Vec repeated(const uint16_t* p) {
        int32_t pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
    }
    static __m512 dot(__m512 acc, __m512 a, __m512 b) {
        __m512bh left, right;
        __builtin_memcpy(&left, &a, sizeof a);
        __builtin_memcpy(&right, &b, sizeof b);
        return _mm512_dpbf16_ps(acc, left, right);
    }
};

struct BF16Pairs {
    using C = Pairs;
    using Wide = Floats;
    using Value = uint16_t;
    using Mask = uint32_t;
    static __m512 expand(const Value* p, Mask m) {
        return _mm512_castsi512_ps(
            _mm512_mask_expand_epi16(fresh_zeros<__m512i>(), m, in_register(_mm512_loadu_si512(p))));
    }
    static Value one(Value a) { return a; }
    static __m512 wide(const Value* p) { return BF16::wide(p); }
    static void round(__m512 a, Value* p) { BF16::round(a, p); }
};

}  // namespace
