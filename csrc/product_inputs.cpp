#include "product_inputs.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "pool.h"

namespace secateur {
namespace {

constexpr uint64_t least_work = 1 << 18;     // elements worth waking a second thread for
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
    const bool as_they_are = stride_ == columns && width_ == in_width;
    char* room = as_they_are ? nullptr : rows_room_.of<char>(std::max<uint64_t>(1, p.n * stride_ * width_));
    rows_ = as_they_are ? static_cast<const char*>(p.x) : room;
    std::atomic<bool> all{true};
    std::atomic<uint64_t> next{0};
    const unsigned workers = p.n * columns < least_work ? 1 : static_cast<unsigned>(std::min<uint64_t>(p.n, pool_size()));
    run(workers, [&](unsigned) {
        for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < p.n;) {
            const char* from = static_cast<const char*>(p.x) + i * columns * in_width;
            if (!all_finite(p.dtype, from, columns)) all = false;
            if (as_they_are) continue;
            char* to = room + i * stride_ * width_;
            if (narrow) std::memcpy(to, from, columns * 2);
            else widen(kernels, p.dtype, from, columns, reinterpret_cast<float*>(to));
            std::memset(to + columns * width_, 0, (stride_ - columns) * width_);
        }
    });
    return all;
}

void Inputs::plan_turn(const ProductKernels& kernels, int vectors, uint64_t n, bool to_multiply) {
    lanes_ = kernels.lanes;
    vectors_ = vectors;
    square_ = kernels.turn;
    turned_ = n;
    columns_ = to_multiply ? stride_ * width_ / sizeof(uint32_t) : stride_;
    panels_ = panels_room_.of<char>(std::max<uint64_t>(1, panels(n) * panel_lanes() * stride_ * width_));
}

void Inputs::turn_piece(uint64_t i) const {
    if (width_ == 2 && columns_ == stride_) turn_as<uint16_t>(i);
    else if (square_ && (i / (columns_ / turn_block) + 1) * panel_lanes() <= turned_) turn_squares(i);
    else turn_as<uint32_t>(i);
}

void Inputs::turn_squares(uint64_t piece) const {
    const uint64_t wide = panel_lanes(), blocks = columns_ / turn_block, panel = piece / blocks, k = piece % blocks * turn_block;
    const auto* from = reinterpret_cast<const uint32_t*>(rows_) + panel * wide * columns_ + k;
    auto* to = reinterpret_cast<uint32_t*>(panels_) + (panel * columns_ + k) * wide;
    for (uint64_t c = 0; c < turn_block; c += lanes_)
        for (uint64_t lane = 0; lane < wide; lane += lanes_)
            square_(from + lane * columns_ + c, columns_, to + c * wide + lane, wide);
}

template <class T>
void Inputs::turn_as(uint64_t piece) const {
    const uint64_t wide = panel_lanes(), columns = columns_, n = turned_, blocks = columns / turn_block;
    const uint64_t panel = piece / blocks, k = piece % blocks * turn_block;
    const auto* from = reinterpret_cast<const T*>(rows_);
    T* to = reinterpret_cast<T*>(panels_) + (panel * columns + k) * wide;
    const uint64_t held = std::min(wide, n - std::min(n, panel * wide));
    const T* first = from + panel * wide * columns + k;
    for (uint64_t c = 0; c < turn_block; ++c) {  // a line is written whole, since another thread may have had it
        for (uint64_t lane = 0; lane < held; ++lane) to[c * wide + lane] = first[lane * columns + c];
        for (uint64_t lane = held; lane < wide; ++lane) to[c * wide + lane] = T{0};
    }
}

}  // namespace secateur
