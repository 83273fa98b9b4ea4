// From GGML blocks, row by row, to panels. Numbers do not change; they are only put where a vector load finds them: four bytes
// (columns 4c to 4c + 3) at a time, as words. A panel is written from front to back by blocks, so that a file is packed about as
// fast as it can be read: packing takes no longer than mapping a packed copy would.
#include <cstring>
#include "formats.h"
#include "pack.h"

namespace herd {
namespace {

uint32_t word(const uint8_t* p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

// Chunk c of a row in a group's body: 64 bytes a chunk, four of each row.
void put(uint8_t* body, int c, int row, uint32_t x) { std::memcpy(body + 64 * c + 4 * row, &x, 4); }

void k_scales(const uint8_t* s, int j, uint8_t* scale, uint8_t* minimum) {
    if (j < 4) {
        *scale = s[j] & 63;
        *minimum = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
        *minimum = (s[j + 4] >> 4) | (s[j] >> 6 << 4);
    }
}

// One block of one row to its places: `to` is the panel's block. Nibbles of a file's block are low for the first half of a group
// (Q4_0), of a pair of groups (Q4_K, Q5_K) or of half a block (Q6_K); in panels for the first half of each group.
template <int FORMAT>
void row_block(const uint8_t* block, uint8_t* to, int r) {
    constexpr Layout l = layout(FORMAT);
    if constexpr (FORMAT == Q4_0 || FORMAT == Q8_0) {
        std::memcpy(to + 2 * r, block, 2);
        for (int c = 0; c < (FORMAT == Q4_0 ? 4 : 8); ++c)
            put(to + 32, c, r, word(block + 2 + 4 * c) ^ (FORMAT == Q8_0 ? 0x80808080u : 0u));
        return;
    }
    std::memcpy(to + 2 * r, block + (FORMAT == Q6_K ? 208 : 0), 2);
    if constexpr (FORMAT != Q6_K) std::memcpy(to + 32 + 2 * r, block + 2, 2);
    for (int g = 0; g < 8; ++g) {
        uint8_t* group = to + l.head + g * l.body;
        uint8_t* body = group + 32;
        if constexpr (FORMAT == Q6_K) {
            const int half = g / 4, k = g % 4, shift = k < 2 ? 0 : 4;
            group[r] = block[192 + 2 * g];
            group[16 + r] = block[192 + 2 * g + 1];
            const uint8_t* low = block + 64 * half + 32 * (k & 1);
            const uint8_t* high = block + 128 + 32 * half;
            for (int c = 0; c < 4; ++c)
                put(body, c, r, (word(low + 4 * c) >> shift & 0x0f0f0f0fu) | (word(low + 16 + 4 * c) >> shift & 0x0f0f0f0fu) << 4);
            for (int h = 0; h < 2; ++h) {
                uint32_t top = 0;
                for (int j = 0; j < 4; ++j) top |= (word(high + 16 * h + 4 * j) >> 2 * k & 0x03030303u) << 2 * j;
                put(body, 4 + h, r, top);
            }
        } else {
            k_scales(block + 4, g, group + r, group + 16 + r);
            const int shift = g & 1 ? 4 : 0;
            const uint8_t* low = block + (FORMAT == Q4_K ? 16 : 48) + g / 2 * 32;
            for (int c = 0; c < 4; ++c)
                put(body, c, r, (word(low + 4 * c) >> shift & 0x0f0f0f0fu) | (word(low + 16 + 4 * c) >> shift & 0x0f0f0f0fu) << 4);
            if constexpr (FORMAT == Q5_K) {
                uint32_t fifth = 0;
                for (int k = 0; k < 8; ++k) fifth |= (word(block + 16 + 4 * k) >> g & 0x01010101u) << k;
                put(body, 4, r, fifth);
            }
        }
    }
}

template <int FORMAT>
void pack_as(const uint8_t* source, int64_t rows, int64_t columns, int64_t first, int64_t last, uint8_t* out) {
    constexpr Layout l = layout(FORMAT);
    constexpr int64_t size = l.head + int64_t(l.columns / GROUP) * l.body;
    const int64_t blocks = columns / l.columns;
    for (int64_t p = first; p < last; ++p) {
        uint8_t* panel = out + (p - first) * blocks * size;
        const int64_t n = rows - p * PANEL < PANEL ? rows - p * PANEL : PANEL;
        if (n < PANEL) std::memset(panel, 0, blocks * size);
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t r = 0; r < n; ++r)
                row_block<FORMAT>(source + ((p * PANEL + r) * blocks + b) * l.block, panel + b * size, int(r));
    }
}

}  // namespace

void pack(int format, const uint8_t* source, int64_t rows, int64_t columns, int64_t first, int64_t last, uint8_t* out) {
    switch (format) {
        case Q4_0: return pack_as<Q4_0>(source, rows, columns, first, last, out);
        case Q8_0: return pack_as<Q8_0>(source, rows, columns, first, last, out);
        case Q4_K: return pack_as<Q4_K>(source, rows, columns, first, last, out);
        case Q5_K: return pack_as<Q5_K>(source, rows, columns, first, last, out);
        case Q6_K: return pack_as<Q6_K>(source, rows, columns, first, last, out);
    }
}

}  // namespace herd
