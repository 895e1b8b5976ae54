#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "pool.h"
#include "product_inputs.h"
#include "product_rounding.h"

namespace secateur {
namespace {

constexpr uint64_t most_rows = 64;          // of a block
constexpr uint64_t block_bytes = 8192;      // of one such row
constexpr uint64_t ahead = 4096;            // bytes
constexpr uint64_t least_work = 1 << 13;    // multiplications worth a thread
constexpr uint64_t most_inputs = 1024;

// Rows in pieces that cost about the same bytes, each a multiple of `unit` but for the last.
std::vector<uint64_t> pieces_of(const Matrix& m, bool bitmask, uint64_t width, uint64_t unit, uint64_t count) {
    const uint64_t row_bytes = bitmask ? m.padded / 8 : 8, value_bytes = width + (bitmask ? 0 : 2);
    const auto cost = [&](uint64_t row) { return row * row_bytes + static_cast<uint64_t>(m.starts[row]) * value_bytes; };
    std::vector<uint64_t> ends;
    for (uint64_t i = 1; i <= count; ++i) {
        uint64_t low = ends.empty() ? 0 : ends.back(), high = m.rows;
        const uint64_t asked = cost(m.rows) / count * i;
        while (low < high) {
            const uint64_t middle = (low + high) / 2;
            if (cost(middle) < asked) low = middle + 1; else high = middle;
        }
        const uint64_t end = i == count ? m.rows : std::min(m.rows, (low + unit - 1) / unit * unit);
        if (ends.empty() || end > ends.back()) ends.push_back(end);
    }
    return ends;
}

class Job {
public:
    Job(const ProductKernels& kernels, const Product& p, Method method)
        : kernels_(kernels), p_(p), values_(kernels.of[p.dtype]), method_(method) {}

    void run() {
        prepare();
        const uint64_t work = static_cast<uint64_t>(p_.matrix.starts[p_.matrix.rows]) * p_.n + p_.matrix.rows * p_.matrix.columns / 16;
        const auto workers = static_cast<unsigned>(std::clamp<uint64_t>(work / least_work, 1, pool_size()));
        const uint64_t unit = spreads() ? kernels_.block_rows : Rounding::rows;
        const auto ends = pieces_of(p_.matrix, p_.bitmask, value_width(), unit, workers == 1 ? 1 : 8 * workers);
        const uint64_t turns = inputs_.turn_pieces();
        std::atomic<uint64_t> next{0}, turn{0}, turned{0};
        // One parallel region, since waking the threads twice would take longer than turning the inputs.
        secateur::run(workers, [&](unsigned) {
            for (uint64_t i; (i = turn.fetch_add(1, std::memory_order_relaxed)) < turns;) {
                inputs_.turn_piece(i);
                turned.fetch_add(1, std::memory_order_release);
            }
            while (turned.load(std::memory_order_acquire) < turns) std::this_thread::yield();
            for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < ends.size();)
                rows(i ? ends[i - 1] : 0, ends[i]);
        });
    }

private:
    // Rows are spread out, some at a time, and multiplied as a block.
    bool spreads() const { return method_ == by_tile || method_ == by_pairs; }

    // Zeros are skipped only where every input is finite: zero times infinity is no zero.
    void prepare() {
        if (method_ == by_pairs && !(values_.pairs && kernels_.skip_pairs)) method_ = by_tile;
        const bool gathers = method_ == by_direct && !p_.bitmask, turns = method_ == by_skip && p_.dtype == bf16;
        if (!inputs_.lay_out(kernels_, p_, turns || (values_.pairs && !gathers)) && method_ != by_tile) {
            method_ = by_tile;
            inputs_.lay_out(kernels_, p_, values_.pairs);
        }
        if (method_ == by_skip) inputs_.plan_turn(kernels_, p_.n > kernels_.lanes ? 2 : 1, p_.n, false);
        if (spreads()) share_out();
    }

    // Which inputs are multiplied in panels, and which one at a time: a panel that is half empty costs as much as a full one.
    void share_out() {
        if (!kernels_.panel[values_.pairs] || p_.n < kernels_.panel_from) return;
        const uint64_t rest = p_.n % kernels_.lanes;
        panels_ = p_.n / kernels_.lanes + (rest > kernels_.lanes / 2 || p_.n < kernels_.lanes);
        in_panels_ = std::min(p_.n, panels_ * kernels_.lanes);
        inputs_.plan_turn(kernels_, 1, in_panels_, true);
    }

    void rows(uint64_t first, uint64_t last) {
        if (spreads()) tiled(first, last);
        else if (method_ == by_skip) skipped(first, last);
        else direct(first, last);
    }

    void direct(uint64_t first, uint64_t last) {
        const Rounding out(kernels_, p_);
        float sums[Rounding::rows * direct_inputs];
        for (uint64_t r = first; r < last; r += Rounding::rows) {
            const uint64_t count = std::min<uint64_t>(Rounding::rows, last - r);
            for (uint64_t i = 0; i < p_.n; i += direct_inputs) {
                const uint64_t n = std::min<uint64_t>(direct_inputs, p_.n - i);
                for (uint64_t a = 0; a < count; ++a) direct_row(r + a, i, n, sums + a * direct_inputs);
                out.put(sums, direct_inputs, r, count, i, n);
            }
        }
    }

    void direct_row(uint64_t row, uint64_t input, uint64_t n, float* sums) const {
        if (p_.bitmask) return values_.direct(&p_.matrix, row, inputs_.row(input), inputs_.stride(), n, sums);
        for (uint64_t i = 0; i < n; ++i) sums[i] = values_.gather(&p_.matrix, row, static_cast<const float*>(inputs_.row(input + i)));
    }

    void skipped(uint64_t first, uint64_t last) {
        const Rounding out(kernels_, p_);
        const uint64_t lanes = inputs_.panel_lanes();
        const auto skip = kernels_.skip[p_.dtype == bf16];
        Room columns, values, sums;
        auto* listed = columns.of<uint16_t>(p_.matrix.columns + padding);
        auto* widened = values.of<float>(p_.matrix.columns + padding);
        auto* found = sums.of<float>(Rounding::rows * lanes);
        for (uint64_t panel = 0; panel * lanes < p_.n; ++panel)
            for (uint64_t r = first; r < last; r += Rounding::rows) {
                const uint64_t count = std::min<uint64_t>(Rounding::rows, last - r);
                for (uint64_t a = 0; a < count; ++a) {
                    const uint16_t* at = columns_of(r + a, listed);
                    const float* weights = floats_of(r + a, widened);
                    skip(at, weights, stored(r + a), inputs_.panel(panel), inputs_.panel_vectors(), found + a * lanes);
                }
                out.put(found, lanes, r, count, panel * lanes, std::min(lanes, p_.n - panel * lanes));
            }
    }

    const uint16_t* columns_of(uint64_t row, uint16_t* room) const {
        if (p_.bitmask) {
            kernels_.list(bits(row), p_.matrix.padded, room);
            return room;
        }
        const auto* at = static_cast<const uint16_t*>(p_.matrix.where) + p_.matrix.starts[row];
        ask_for(at, stored(row) * sizeof *at);
        return at;
    }

    const float* floats_of(uint64_t row, float* room) const {
        const void* at = value_at(static_cast<uint64_t>(p_.matrix.starts[row]));
        ask_for(at, stored(row) * value_width());
        if (p_.dtype == f32) return static_cast<const float*>(at);
        values_.widen(at, stored(row), room);
        return room;
    }

    // What will be read some rows later: a row is worked on for so long that the processor does not look that far ahead.
    static void ask_for(const void* at, uint64_t bytes) {
        for (uint64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i + ahead);
    }

    void tiled(uint64_t first, uint64_t last) {
        const Rounding out(kernels_, p_);
        const uint64_t block_rows = kernels_.block_rows, unit = panels_ ? kernels_.panel_rows : kernels_.tile_rows;
        const uint64_t wide = panels_ * kernels_.lanes, rest = p_.n - in_panels_;
        Room spread, panel_sums, rest_sums;
        auto* w = spread.of<char>(block_rows * block_bytes);
        auto* of_panels = panel_sums.of<float>(block_rows * wide);
        auto* of_rest = rest_sums.of<float>(block_rows * rest);
        for (uint64_t r = first; r < last; r += block_rows) {
            const uint64_t count = std::min<uint64_t>(block_rows, last - r), whole = (count + unit - 1) / unit * unit;
            std::memset(of_panels, 0, whole * wide * sizeof(float));
            std::memset(of_rest, 0, whole * rest * sizeof(float));
            tile_block(r, count, whole, w, of_panels, of_rest);
            if (panels_) out.put(of_panels, wide, r, count, 0, in_panels_);
            if (rest) out.put(of_rest, rest, r, count, in_panels_, rest);
        }
    }

    void tile_block(uint64_t row, uint64_t count, uint64_t whole, char* w, float* of_panels, float* of_rest) const {
        const bool pairs = values_.pairs;
        const uint64_t width = pairs ? 2 : 4, most = block_bytes / width, padded = p_.matrix.padded;
        const auto panel = method_ == by_pairs ? kernels_.skip_pairs : kernels_.panel[pairs];
        uint64_t done[most_rows];
        for (uint64_t a = 0; a < count; ++a) done[a] = static_cast<uint64_t>(p_.matrix.starts[row + a]);
        for (uint64_t k = 0; k < padded; k += most) {
            const uint64_t columns = std::min(most, padded - k);
            for (uint64_t a = 0; a < count; ++a) spread_row(row + a, k, columns, done[a], w + a * columns * width);
            std::memset(w + count * columns * width, 0, (whole - count) * columns * width);
            if (panels_) panel(w, whole, inputs_.panel(0, k), inputs_.panel_stride(), panels_, columns, of_panels);
            if (p_.n > in_panels_)
                kernels_.tile[pairs](w, whole, inputs_.row(in_panels_, k), inputs_.stride(), p_.n - in_panels_, columns, of_rest);
        }
    }

    // Columns k … k + columns - 1 of a row; `done` is its next value.
    void spread_row(uint64_t row, uint64_t k, uint64_t columns, uint64_t& done, char* out) const {
        if (p_.bitmask) {
            done += values_.spread(bits(row) + k / 8, value_at(done), columns, out);
            return;
        }
        const auto* all = static_cast<const uint16_t*>(p_.matrix.where);
        const uint64_t count = below(all + done, static_cast<uint64_t>(p_.matrix.starts[row + 1]) - done, k + columns);
        std::memset(out, 0, columns * (values_.pairs ? 2 : 4));
        values_.scatter(all + done, value_at(done), count, k, out);
        done += count;
    }

    // How many of ascending columns come before `end`.
    static uint64_t below(const uint16_t* columns, uint64_t count, uint64_t end) {
        uint64_t i = 0;
        while (i + 8 <= count && columns[i + 7] < end) i += 8;
        while (i < count && columns[i] < end) ++i;
        return i;
    }

    uint64_t stored(uint64_t row) const {
        return static_cast<uint64_t>(p_.matrix.starts[row + 1] - p_.matrix.starts[row]);
    }

    uint64_t value_width() const { return p_.dtype == f32 ? 4 : 2; }

    const uint8_t* bits(uint64_t row) const {
        return static_cast<const uint8_t*>(p_.matrix.where) + row * (p_.matrix.padded / 8);
    }

    const void* value_at(uint64_t i) const {
        return static_cast<const char*>(p_.matrix.values) + i * value_width();
    }

    const ProductKernels& kernels_;
    const Product& p_;
    const ValueKernels& values_;
    Method method_;
    Inputs inputs_;
    uint64_t panels_ = 0, in_panels_ = 0;
};

}  // namespace

// Many inputs are taken some at a time: their sums, and what is spread out for them, then stay in the cache, and the time
// for each is the same however many there are.
void product(const ProductKernels& kernels, const Product& p, Method method) {
    const uint64_t width = p.dtype == f32 ? 4 : 2;
    for (uint64_t i = 0; i < p.n && p.matrix.rows; i += most_inputs) {
        Product some = p;
        some.n = std::min(most_inputs, p.n - i);
        some.x = static_cast<const char*>(p.x) + i * p.matrix.columns * width;
        some.y = static_cast<char*>(p.y) + i * p.matrix.rows * width;
        Job(kernels, some, method).run();
    }
}

}  // namespace secateur
