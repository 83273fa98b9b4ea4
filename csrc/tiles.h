// Products of bytes in the tiles of Intel's AMX: 16 tokens by 16 rows of a panel by a whole group at a time. A group of a panel is
// what the second operand wants already: four columns of 16 rows to a line. Sums of integers are exact, and what follows them is the
// order of panel.h, so every bit is that of the same instruction set without tiles.
//
// HERD_TILES_EMULATED computes what the tiles would, for processors without them: for tests.
#pragma once
#include <cstdint>
#include <cstring>
#ifndef HERD_TILES_EMULATED
#include <immintrin.h>
#endif

namespace herd::HERD_ISA {

constexpr int TILE_TOKENS = 16, TILE_GROUPS = 4;  // rows of the first operand; products under way at once

#ifdef HERD_TILES_EMULATED

class Tiles {
public:
    explicit Tiles(int steps) : steps_(steps) {}
    // sums[g] [16 tokens, 16 rows] = signed bytes x[g] [16, 4 steps], `stride` from row to row, times unsigned bytes w[g] [steps, 16, 4].
    void product(const uint8_t* const (&x)[TILE_GROUPS], int64_t stride, const uint8_t* const (&w)[TILE_GROUPS], int32_t (&sums)[TILE_GROUPS][TILE_TOKENS][16]) const {
        for (int g = 0; g < TILE_GROUPS; ++g)
            for (int t = 0; t < TILE_TOKENS; ++t)
                for (int r = 0; r < 16; ++r) {
                    int32_t sum = 0;
                    for (int k = 0; k < 4 * steps_; ++k)
                        sum += int32_t(static_cast<int8_t>(x[g][t * stride + k])) * w[g][k / 4 * 64 + 4 * r + k % 4];
                    sums[g][t][r] = sum;
                }
    }

private:
    int steps_;
};

#else

// Tiles 0 to 3 hold sums, 4 and 6 tokens, 5 and 7 weights. Shapes belong to a thread and last as long as this object.
class Tiles {
public:
    explicit Tiles(int steps) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; ++i) {
            const bool tokens = i == 4 || i == 6, weights = i == 5 || i == 7;
            shapes.rows[i] = uint8_t(weights ? steps : TILE_TOKENS);
            shapes.bytes[i] = uint16_t(tokens ? 4 * steps : 64);
        }
        _tile_loadconfig(&shapes);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
    void product(const uint8_t* const (&x)[TILE_GROUPS], int64_t stride, const uint8_t* const (&w)[TILE_GROUPS], int32_t (&sums)[TILE_GROUPS][TILE_TOKENS][16]) const {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, x[0], stride);
        _tile_loadd(5, w[0], 64);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, x[1], stride);
        _tile_loadd(7, w[1], 64);
        _tile_dpbsud(1, 6, 7);
        _tile_loadd(4, x[2], stride);
        _tile_loadd(5, w[2], 64);
        _tile_dpbsud(2, 4, 5);
        _tile_loadd(6, x[3], stride);
        _tile_loadd(7, w[3], 64);
        _tile_dpbsud(3, 6, 7);
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
};

#endif

}  // namespace herd::HERD_ISA
