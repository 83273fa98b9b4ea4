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

// Positions [begin, end) of one head -> to [end - begin, head_dim] float32. One head's rows lie far apart, where the processor
// does not fetch ahead by itself: each row asks for its like some blocks on, up to position `last`.
template <int KIND> inline void fetch(const Pages& c, int64_t head, int64_t begin, int64_t end, int64_t last, float* to) {
    const int64_t ahead = c.block_size < 32 ? 32 / c.block_size : 1, blocks = (last + c.block_size - 1) / c.block_size;
    constexpr int width = KIND == F32 ? 4 : KIND == I8 ? 1 : 2;
    const int64_t dim = c.head_dim, step = c.heads * dim * width;
    for (int64_t j = begin; j < end;) {
        const int64_t offset = j % c.block_size, slot = int64_t(c.table[j / c.block_size]) * c.block_size + offset;
        const int64_t stop = j + c.block_size - offset < end ? j + c.block_size - offset : end;
        const uint8_t* p = c.data + slot * step + head * dim * width;
        const float* scale = c.scales + (KIND == I8 ? slot * c.heads + head : 0);
        const int64_t later = j / c.block_size + ahead < blocks ? j / c.block_size + ahead : j / c.block_size;
        const uint8_t* next = c.data + (int64_t(c.table[later]) * c.block_size + offset) * step + head * dim * width;
        for (; j < stop; ++j, p += step, next += step, to += dim) {
            for (int64_t i = 0; i < dim * width; i += 64) __builtin_prefetch(next + i);
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
