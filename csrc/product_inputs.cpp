#include "product_inputs.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "pool.h"

namespace secateur {
namespace {

constexpr uint64_t least_work = 1 << 15;     // elements worth waking a second thread for
constexpr uint64_t most_kept = 64 << 20;

struct Piece {
    void* data;
    uint64_t size;
};

struct Kept {
    std::vector<Piece> pieces;
    ~Kept() {
        for (const Piece& p : pieces) std::free(p.data);
    }
};

thread_local Kept kept;

template <class Bits>
bool finite(const void* values, uint64_t count, Bits exponent) {
    const auto* p = static_cast<const Bits*>(values);
    Bits bad = 0;
    for (uint64_t i = 0; i < count; ++i) bad |= static_cast<Bits>((p[i] & exponent) == exponent);
    return !bad;
}

bool all_finite(Dtype dtype, const void* values, uint64_t count) {
    if (dtype == f32) return finite<uint32_t>(values, count, 0x7F800000u);
    return finite<uint16_t>(values, count, static_cast<uint16_t>(dtype == bf16 ? 0x7F80 : 0x7C00));
}

// Kernels widen whole vectors, and nothing beyond the last input may be read.
void widen(const ProductKernels& kernels, Dtype dtype, const void* from, uint64_t count, float* to) {
    if (dtype == f32) {
        std::memcpy(to, from, count * sizeof(float));
        return;
    }
    const auto* values = static_cast<const uint16_t*>(from);
    const uint64_t whole = count / 16 * 16;
    kernels.of[dtype].widen(values, whole, to);
    uint16_t rest[16] = {};
    std::memcpy(rest, values + whole, (count - whole) * sizeof *rest);
    float wide[16];
    kernels.of[dtype].widen(rest, 16, wide);
    std::memcpy(to + whole, wide, (count - whole) * sizeof *wide);
}

}  // namespace

Room::Room() : held_(nullptr), size_(0) {
    if (kept.pieces.empty()) return;
    held_ = kept.pieces.back().data;
    size_ = kept.pieces.back().size;
    kept.pieces.pop_back();
}

Room::~Room() {
    if (size_ > most_kept) std::free(held_);
    else if (held_) kept.pieces.push_back({held_, size_});
}

void* Room::bytes(uint64_t count) {
    if (count > size_) {
        std::free(held_);
        size_ = (count + 4095) / 4096 * 4096;
        held_ = std::aligned_alloc(64, size_);
        if (!held_) {
            size_ = 0;
            throw std::bad_alloc();
        }
    }
    return held_;
}

bool Inputs::lay_out(const ProductKernels& kernels, const Product& p, bool narrow) {
    const uint64_t columns = p.matrix.columns, in_width = p.dtype == f32 ? 4 : 2;
    stride_ = p.matrix.padded;
    width_ = narrow ? 2 : 4;
    rows_ = rows_room_.of<char>(std::max<uint64_t>(1, p.n * stride_ * width_));
    std::atomic<bool> all{true};
    std::atomic<uint64_t> next{0};
    const unsigned workers = p.n * columns < least_work ? 1 : static_cast<unsigned>(std::min<uint64_t>(p.n, pool_size()));
    run(workers, [&](unsigned) {
        for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < p.n;) {
            const char* from = static_cast<const char*>(p.x) + i * columns * in_width;
            char* to = rows_ + i * stride_ * width_;
            if (narrow) std::memcpy(to, from, columns * 2);
            else widen(kernels, p.dtype, from, columns, reinterpret_cast<float*>(to));
            std::memset(to + columns * width_, 0, (stride_ - columns) * width_);
            if (!all_finite(p.dtype, from, columns)) all = false;
        }
    });
    return all;
}

void Inputs::turn(uint64_t lanes, int vectors, uint64_t n) {
    lanes_ = lanes;
    vectors_ = vectors;
    if (width_ == 2) turn_as<uint16_t>(stride_, n);
    else turn_as<float>(stride_, n);
}

void Inputs::turn_to_multiply(uint64_t lanes, uint64_t n) {
    lanes_ = lanes;
    vectors_ = 1;
    turn_as<uint32_t>(stride_ * width_ / sizeof(uint32_t), n);
}

template <class T>
void Inputs::turn_as(uint64_t columns, uint64_t n) {
    constexpr uint64_t block = 32;
    const uint64_t wide = panel_lanes(), all = panels(n), blocks = columns / block;
    panels_ = panels_room_.of<char>(std::max<uint64_t>(1, all * wide * columns * sizeof(T)));
    const auto* from = reinterpret_cast<const T*>(rows_);
    std::atomic<uint64_t> next{0};
    run(n * columns < least_work ? 1 : pool_size(), [&](unsigned) {
        for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < all * blocks;) {
            const uint64_t panel = i / blocks, k = i % blocks * block;
            T* to = reinterpret_cast<T*>(panels_) + (panel * columns + k) * wide;
            for (uint64_t lane = 0; lane < wide; ++lane) {
                const uint64_t input = panel * wide + lane;
                for (uint64_t c = 0; c < block; ++c) to[c * wide + lane] = input < n ? from[input * columns + k + c] : T{0};
            }
        }
    });
}

}  // namespace secateur
