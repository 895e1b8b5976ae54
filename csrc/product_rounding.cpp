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

}  // namespace

template <class T>
void Rounding::put_as(const float* sums, uint64_t stride, uint64_t row, uint64_t count, uint64_t input, uint64_t inputs) const {
    const auto* bias = static_cast<const typename T::Value*>(p_.bias);
    auto* y = static_cast<typename T::Value*>(p_.y) + input * p_.matrix.rows + row;
    uint64_t b = 0;
    if (fast_ && count == rows)
        for (; b + 16 <= inputs; b += 16)
            fast_(sums + b, stride, bias ? bias + row : nullptr, y + b * p_.matrix.rows, p_.matrix.rows);
    for (; b < inputs; ++b)
        for (uint64_t a = 0; a < count; ++a) {
            const float added = bias ? T::wide(bias[row + a]) : -0.0f;
            y[b * p_.matrix.rows + a] = T::rounded(sums[a * stride + b] + added);
        }
}

void Rounding::put(const float* sums, uint64_t stride, uint64_t row, uint64_t count, uint64_t input, uint64_t inputs) const {
    for (uint64_t a = 0; a < count; a += rows) {
        const uint64_t some = count - a < rows ? count - a : rows;
        switch (p_.dtype) {
            case f32: put_as<AsFloat>(sums + a * stride, stride, row + a, some, input, inputs); break;
            case bf16: put_as<AsBF16>(sums + a * stride, stride, row + a, some, input, inputs); break;
            case f16: put_as<AsHalf>(sums + a * stride, stride, row + a, some, input, inputs); break;
        }
    }
}

}  // namespace secateur
