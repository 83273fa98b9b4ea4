// Keys and values in blocks: one row is written, a tile is read as float32. Bytes have a scale per token and head.
#pragma once
#include "rows.h"

namespace herd::HERD_ISA {

template <int KIND> inline F element(const uint8_t* p, int64_t i) {
    if constexpr (KIND == F32) return V::load(reinterpret_cast<const float*>(p) + i);
    else if constexpr (KIND == F16) return V::halves(p + 2 * i);
    else if constexpr (KIND == BF16) return V::brains(reinterpret_cast<const uint16_t*>(p) + i);
    else return V::signed_bytes(p + i);
}

// Writes the heads of one row, x [heads, head_dim], to slot `slot`.
template <int KIND> inline void keep(uint8_t* cache, float* scales, int64_t slot, const float* x, int64_t heads, int64_t head_dim) {
    const int64_t n = heads * head_dim, at = slot * n;
    if constexpr (KIND == I8) {
        int8_t* q = reinterpret_cast<int8_t*>(cache) + at;
        for (int64_t h = 0; h < heads; ++h) scales[slot * heads + h] = to_bytes(x + h * head_dim, head_dim, q + h * head_dim);
        return;
    }
    for (int64_t i = 0; i < n; i += L) {
        const F f = V::load(x + i);
        if constexpr (KIND == F32) V::store(reinterpret_cast<float*>(cache) + at + i, f);
        if constexpr (KIND == F16) V::store_halves(reinterpret_cast<uint16_t*>(cache) + at + i, f);
        if constexpr (KIND == BF16) V::store_brains(reinterpret_cast<uint16_t*>(cache) + at + i, f);
    }
}

struct Pages {                 // one sequence's keys or values of one layer
    const uint8_t* data;       // [blocks, block_size, heads, head_dim]
    const float* scales;       // [blocks, block_size, heads]
    const int32_t* table;
    int64_t block_size, heads, head_dim;
};

template <int KIND> constexpr int width_of = KIND == F32 ? 4 : KIND == I8 ? 1 : 2;  // bytes of a number

// What is fetched next. One head's rows lie far apart, where the processor does not fetch ahead by itself: while rows of one are
// widened, those of the next are asked for one by one, into the second-level cache, which has room for more of them under way.
template <int KIND> class Later {
public:
    Later(const Pages& c, int64_t head, int64_t begin, int64_t end) : c_(c), at_(begin), end_(end), head_(head * c.head_dim * width_of<KIND>) {}
    void ask() {
        if (at_ >= end_) return;
        const int64_t bytes = c_.head_dim * width_of<KIND>, step = c_.heads * bytes;
        if (!left_) {
            const int64_t offset = at_ % c_.block_size;
            left_ = c_.block_size - offset;
            p_ = c_.data + (int64_t(c_.table[at_ / c_.block_size]) * c_.block_size + offset) * step + head_;
        }
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p_ + i, 0, SECOND_LEVEL);
        p_ += step;
        --left_;
        ++at_;
    }

private:
    const Pages& c_;
    int64_t at_, end_, head_, left_ = 0;
    const uint8_t* p_ = nullptr;
};

// Positions [begin, end) of one head -> to [end - begin, head_dim] float32.
template <int KIND> inline void fetch(const Pages& c, int64_t head, int64_t begin, int64_t end, Later<KIND> later, float* to) {
    constexpr int width = width_of<KIND>;
    const int64_t dim = c.head_dim, step = c.heads * dim * width;
    for (int64_t j = begin; j < end;) {
        const int64_t offset = j % c.block_size, slot = int64_t(c.table[j / c.block_size]) * c.block_size + offset;
        const int64_t stop = j + c.block_size - offset < end ? j + c.block_size - offset : end;
        const uint8_t* p = c.data + slot * step + head * dim * width;
        const float* scale = c.scales + (KIND == I8 ? slot * c.heads + head : 0);
        for (; j < stop; ++j, p += step, to += dim) {
            later.ask();
            if constexpr (KIND == I8) {
                const F s = V::set(*scale);
                for (int64_t d = 0; d < dim; d += L) V::store(to + d, V::mul(element<KIND>(p, d), s));
                scale += c.heads;
            } else {
                for (int64_t d = 0; d < dim; d += L) V::store(to + d, element<KIND>(p, d));
            }
        }
    }
}

}  // namespace herd::HERD_ISA
