// How weights lie in memory while they are used: panels of 16 rows, columns in groups of 32, so that one vector load serves
// 16 rows and a panel is read from front to back. Numbers are those of the GGML block they were made from, bit for bit.
//
// Within a group, chunk c (64 bytes) holds for row r the four bytes of lane r; nibble formats keep columns 4c..4c+3 in the low
// and 16+4c..16+4c+3 in the high nibbles. All quantized numbers are unsigned here; `zero` is what they are offset by.
#pragma once
#include <cstdint>

// The functions are static: compiled with every instruction set's flags, no copy may serve another's.
namespace herd {

constexpr int PANEL = 16;         // rows
constexpr int GROUP = 32;         // columns
constexpr int ACT_GROUP = 128;    // columns that share one activation scale
constexpr int SUM_GROUP = 16;     // columns that share one weight scale at least (Q6_K)

// GGML's own ids.
enum Format : int { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, I8 = 24, BF16 = 30 };

struct Layout {
    int columns;   // per block of the source
    int block;     // bytes of a source block
    int head;      // bytes before the groups of a panel's block
    int body;      // bytes of a group
};

static constexpr Layout layout(int format) {
    switch (format) {
        case Q4_0: return {32, 18, 0, 32 + 256};
        case Q8_0: return {32, 34, 0, 32 + 512};
        case Q4_K: return {256, 144, 64, 32 + 256};
        case Q5_K: return {256, 176, 64, 32 + 256 + 64};
        case Q6_K: return {256, 210, 32, 32 + 256 + 128};
        default: return {0, 0, 0, 0};
    }
}

// Bytes of one panel of `columns` columns.
static constexpr int64_t panel_bytes(int format, int64_t columns) {
    const Layout l = layout(format);
    return columns / l.columns * (l.head + int64_t(l.columns / GROUP) * l.body);
}

}  // namespace herd
