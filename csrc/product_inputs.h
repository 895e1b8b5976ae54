// Inputs of a product as kernels want them: in their form, padded to 64 columns, or turned so that a vector holds one column
// of several inputs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "product.h"

namespace secateur {

// Memory for one use at a time in one thread, kept for the next: fresh pages would cost as much as a small product.
class Room {
public:
    Room();
    ~Room();
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;

    template <class T>
    T* of(uint64_t count) {
        return static_cast<T*>(bytes(count * sizeof(T)));
    }

private:
    void* bytes(uint64_t count);

    void* held_;
    uint64_t size_;
};

class Inputs {
public:
    // As floats or, with `narrow`, as the bf16 that they are. Returns whether all are finite.
    bool lay_out(const ProductKernels& kernels, const Product& p, bool narrow);

    // To be turned, in pieces that any thread may do: panel i will hold inputs i * panel_lanes() …, (columns, panel_lanes()), in
    // the form that they have; `to_multiply`, in panels of one vector, of bf16 (columns / 2, lanes, 2).
    void plan_turn(const ProductKernels& kernels, int vectors, uint64_t n, bool to_multiply);
    uint64_t turn_pieces() const { return panels(turned_) * (columns_ / turn_block); }
    void turn_piece(uint64_t i) const;

    const void* row(uint64_t i, uint64_t column = 0) const { return rows_ + (i * stride_ + column) * width_; }
    uint64_t stride() const { return stride_; }
    const void* panel(uint64_t i, uint64_t column = 0) const {
        return panels_ + (i * stride_ + column) * panel_lanes() * width_;
    }
    uint64_t panel_stride() const { return stride_ * panel_lanes(); }
    uint64_t panels(uint64_t n) const { return (n + panel_lanes() - 1) / panel_lanes(); }
    int panel_vectors() const { return vectors_; }
    uint64_t panel_lanes() const { return static_cast<uint64_t>(vectors_) * lanes_; }

private:
    static constexpr uint64_t turn_block = 32;  // columns of a piece

    template <class T>
    void turn_as(uint64_t piece) const;

    void turn_squares(uint64_t piece) const;

    Room rows_room_, panels_room_;
    const char* rows_ = nullptr;
    char* panels_ = nullptr;
    uint64_t stride_ = 0, width_ = 0, lanes_ = 1;
    uint64_t turned_ = 0, columns_ = 0;  // inputs to be turned, and how many columns they have, or pairs
    int vectors_ = 1;
    decltype(ProductKernels::turn) square_ = nullptr;
};

}  // namespace secateur
