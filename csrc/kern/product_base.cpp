// Any processor: vectors of four floats, which the compiler turns into what there is.
#include "product.h"

namespace {

typedef float Four __attribute__((vector_size(16)));

struct Floats {
    using Elem = float;
    using Vec = Four;
    static constexpr int step = 4;
    static Vec zero() { return Four{0, 0, 0, 0}; }
    static Vec load(const float* p) {
        Four out;
        __builtin_memcpy(&out, p, sizeof out);
        return out;
    }
    static void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof a); }
    static Vec all(float a) { return Four{a, a, a, a}; }
    static Vec add(Vec a, Vec b) { return a + b; }
    static Vec dot(Vec acc, Vec a, Vec b) { return acc + a * b; }
    static float sum(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
    static float one(uint16_t bf16) {
        const uint32_t bits = uint32_t{bf16} << 16;
        float out;
        __builtin_memcpy(&out, &bits, sizeof out);
        return out;
    }
    static Vec from_bf16(const uint16_t* p) { return Four{one(p[0]), one(p[1]), one(p[2]), one(p[3])}; }
    static void halves(const uint16_t* p, Vec& even, Vec& odd) {
        even = Four{one(p[0]), one(p[2]), one(p[4]), one(p[6])};
        odd = Four{one(p[1]), one(p[3]), one(p[5]), one(p[7])};
    }
    static void interleave(float* p, Vec even, Vec odd) {
        store(p, Four{even[0], odd[0], even[1], odd[1]});
        store(p + 4, Four{even[2], odd[2], even[3], odd[3]});
    }
    static void add_sums4(const Vec* a, float* sums) {
        for (int i = 0; i < 4; ++i) sums[i] += sum(a[i]);
    }
};

inline float as_float(uint32_t bits) {
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
}

// A half: 5 bits of exponent, 10 of mantissa. Scaling by 2^112 puts right the exponent, subnormals included.
inline float from_half(uint16_t a) {
    const uint32_t sign = uint32_t{a & 0x8000u} << 16, rest = uint32_t{a & 0x7FFFu} << 13;
    if (rest >= 0x0F800000u) return as_float(sign | 0x7F800000u | rest);
    const float scaled = as_float(rest) * as_float(0x77800000u);
    return sign ? -scaled : scaled;
}

struct F32 {
    using Value = float;
    static float one(Value a) { return a; }
};

struct BF16 {
    using Value = uint16_t;
    static float one(Value a) { return Floats::one(a); }
};

struct F16 {
    using Value = uint16_t;
    static float one(Value a) { return from_half(a); }
};

template <class S>
struct Source : S {
    using C = Floats;
    using Wide = Floats;
    using typename S::Value;
    using Mask = uint8_t;  // of which the lower half is looked at
    static Four wide(const Value* p) { return Four{S::one(p[0]), S::one(p[1]), S::one(p[2]), S::one(p[3])}; }
};

template <class S>
uint64_t spread_bits(const uint8_t* bits, const void* ptr, uint64_t columns, void* out) {
    const auto* values = static_cast<const typename S::Value*>(ptr);
    const auto* begin = values;
    auto* to = static_cast<float*>(out);
    for (uint64_t k = 0; k < columns; ++k) to[k] = bits[k / 8] >> k % 8 & 1 ? S::one(*values++) : 0.0f;
    return static_cast<uint64_t>(values - begin);
}

template <class S>
void direct_bits(const Matrix* m, uint64_t row, const void* ptr, uint64_t stride, uint64_t n, float* sums) {
    const auto* x = static_cast<const float*>(ptr);
    const auto* values = static_cast<const typename S::Value*>(m->values) + m->starts[row];
    const auto* bits = static_cast<const uint8_t*>(m->where) + row * (m->padded / 8);
    for (uint64_t i = 0; i < n; ++i) sums[i] = 0;
    for (uint64_t k = 0; k < m->padded; k += 64)
        for (uint64_t word = mask_at<uint64_t>(bits + k / 8); word; word &= word - 1, ++values) {
            const float* at = x + k + static_cast<uint64_t>(__builtin_ctzll(word));
            for (uint64_t i = 0; i < n; ++i) sums[i] += S::one(*values) * at[i * stride];
        }
}

template <class S>
float gather(const Matrix* m, uint64_t row, const float* x) {
    const auto* columns = static_cast<const uint16_t*>(m->where);
    const auto* values = static_cast<const typename S::Value*>(m->values);
    float sums[4] = {0, 0, 0, 0};
    for (int64_t j = m->starts[row]; j < m->starts[row + 1]; ++j) sums[j & 3] += S::one(values[j]) * x[columns[j]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class S>
constexpr secateur::ValueKernels values_of() {
    return {false, direct_bits<S>, gather<S>, spread_bits<S>, scatter<S>, widen<S>, nullptr};
}

}  // namespace

const secateur::ProductKernels secateur::products_base = {
    "base", 4, 24, 2, 1, 0, {values_of<Source<F32>>(), values_of<Source<BF16>>(), values_of<Source<F16>>()},
    {tile<Floats, 2>, nullptr}, {nullptr, nullptr}, {skip<Floats, Wide>, skip<Floats, Narrow>}, nullptr, nullptr, list_scalar,
};
