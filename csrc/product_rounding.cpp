#include "product_rounding.h"

#include <cstring>

namespace secateur {
namespace {

uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

struct AsFloat {
    using Value = float;
    static float wide(Value a) { return a; }
    static Value rounded(float a) { return a; }
};

struct AsBF16 {
    using Value = uint16_t;
    static float wide(Value a) { return float_of(uint32_t{a} << 16); }
    static Value rounded(float a) {
        const uint32_t bits = bits_of(a);
        const uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        return static_cast<Value>((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : nearest);
    }
};

struct AsHalf {
    using Value = uint16_t;

    // Scaling by 2^112 puts right the exponent, subnormals included.
    static float wide(Value a) {
        const uint32_t sign = uint32_t{a & 0x8000u} << 16, rest = uint32_t{a & 0x7FFFu} << 13;
        if (rest >= 0x0F800000u) return float_of(sign | 0x7F800000u | rest);
        return float_of(sign | bits_of(float_of(rest) * 0x1p112f));
    }

    static Value rounded(float a) {
        const uint32_t bits = bits_of(a), rest = bits & 0x7FFFFFFF;
        const auto sign = static_cast<Value>(bits >> 16 & 0x8000);
        if (rest > 0x7F800000) return sign | 0x7E00;
        if (rest >= 0x477FF000) return sign | 0x7C00;  // 65520 and more
        if (rest < 0x38800000)                         // a subnormal: adding a half makes the sum's last bit its unit
            return sign | static_cast<Value>(bits_of(float_of(rest) + 0.5f) - bits_of(0.5f));
        return sign | static_cast<Value>((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13);
    }
};

template <class T>
void put_as(const Product& p, const float* sums, uint64_t stride, uint64_t row, uint64_t count, uint64_t input, uint64_t inputs) {
    const auto* bias = static_cast<const typename T::Value*>(p.bias);
    auto* y = static_cast<typename T::Value*>(p.y);
    for (uint64_t b = 0; b < inputs; ++b) {
        auto* out = y + (input + b) * p.matrix.rows + row;
        if (bias)
            for (uint64_t a = 0; a < count; ++a) out[a] = T::rounded(sums[a * stride + b] + T::wide(bias[row + a]));
        else
            for (uint64_t a = 0; a < count; ++a) out[a] = T::rounded(sums[a * stride + b]);
    }
}

}  // namespace

void Rounding::put(const float* sums, uint64_t stride, uint64_t row, uint64_t count, uint64_t input, uint64_t inputs) const {
    switch (p_.dtype) {
        case f32: return put_as<AsFloat>(p_, sums, stride, row, count, input, inputs);
        case bf16: return put_as<AsBF16>(p_, sums, stride, row, count, input, inputs);
        case f16: return put_as<AsHalf>(p_, sums, stride, row, count, input, inputs);
    }
}

}  // namespace secateur
