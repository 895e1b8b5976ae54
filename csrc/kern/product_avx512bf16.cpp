// AVX-512 that multiplies bf16 in pairs: Cooper Lake, Sapphire Rapids, Zen 4 and later.
#include "product_pairs.h"

const secateur::ProductKernels secateur::products_avx512bf16 = {
    "avx512bf16", 16, 48, 6, 12, 16, {values_of<F32>(false), values_of<BF16Pairs>(true), values_of<F16>(false)},
    {tile<Floats, 6>, tile<Pairs, 6>}, {panel<Floats>, panel<Pairs>}, {skip<Floats, Wide>, skip<Floats, Narrow>}, skip_pairs, turn_square, list,
};
