#include <algorithm>
#include <cstring>

#include "pool.h"
#include "product.h"

namespace secateur {

bool writes_bf16(const ProductKernels& kernels, Dtype dtype) { return kernels.of[dtype].pairs; }

void make_whole(const ProductKernels& kernels, const Matrix& m, bool bitmask, Dtype dtype, uint64_t first, uint64_t count,
                void* out) {
    const ValueKernels& values = kernels.of[dtype];
    const uint64_t width = dtype == f32 ? 4 : 2, row_bytes = m.padded * (values.pairs ? 2 : 4);
    const uint64_t least = std::max<uint64_t>(1, (64 << 10) / std::max<uint64_t>(1, row_bytes));
    const auto workers = static_cast<unsigned>(std::clamp<uint64_t>(count / least, 1, pool_size()));
    Pieces pieces(count, least, 16 * least, workers);
    run(workers, [&](unsigned) {
        uint64_t begin, end;
        while (pieces.take(begin, end)) {
            for (uint64_t r = begin; r < end; ++r) {
                const auto start = static_cast<uint64_t>(m.starts[first + r]), stop = static_cast<uint64_t>(m.starts[first + r + 1]);
                const void* from = static_cast<const char*>(m.values) + start * width;
                char* to = static_cast<char*>(out) + r * row_bytes;
                if (bitmask) {
                    values.spread(static_cast<const uint8_t*>(m.where) + (first + r) * (m.padded / 8), from, m.padded, to);
                } else {
                    std::memset(to, 0, row_bytes);
                    values.scatter(static_cast<const uint16_t*>(m.where) + start, from, stop - start, 0, to);
                }
            }
        }
    });
}

}  // namespace secateur
