// The key of an element: its bits without the sign. Anonymous, because the kernel objects include it too (see table.h).
#pragma once

#include <cstdint>

namespace {

template <class T>
constexpr T top_bit = T(T(1) << (8 * sizeof(T) - 1));

template <class T>
constexpr T max_key = T(top_bit<T> - 1);

template <class T>
inline T key_of(T bits) {
    return bits & max_key<T>;
}

}  // namespace
