// AVX-512 with VBMI2: Ice Lake and later.
#include "product_avx512.h"

const secateur::ProductKernels secateur::products_avx512 = {
    "avx512", 16, 24, 6, 12, 16, {values_of<F32>(false), values_of<BF16>(false), values_of<F16>(false)},
    {tile<Floats, 6>, nullptr}, {panel<Floats>, nullptr}, {skip<Floats, Wide>, skip<Floats, Narrow>}, nullptr, turn_square, list,
};
