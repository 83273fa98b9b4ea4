// From GGML blocks to the numbers they stand for: the rows of an embedding that a step looks up. The same operations in the same
// order as herd/quant/blocks.py, so the same bits; there, a row costs some twenty calls, which after a step find no cache warm.
#include <cstring>
#include "formats.h"
#include "values.h"

namespace herd {
namespace {

float half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    const uint32_t sign = uint32_t(h >> 15) << 31, exponent = h >> 10 & 31, fraction = h & 1023;
    if (!exponent) {
        const float x = float(fraction) * 0x1p-24f;
        return sign ? -x : x;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

void q4_0(const uint8_t* block, float* out) {
    const float d = half(block);
    for (int i = 0; i < 16; ++i) {
        out[i] = float((block[2 + i] & 15) - 8) * d;
        out[16 + i] = float((block[2 + i] >> 4) - 8) * d;
    }
}

void q8_0(const uint8_t* block, float* out) {
    const float d = half(block);
    for (int i = 0; i < 32; ++i) out[i] = float(int8_t(block[2 + i])) * d;
}

// Q4_K and Q5_K: pairs of groups share 32 bytes of nibbles; `fifth` has a bit for each group, or there is none.
void q45_k(const uint8_t* block, const uint8_t* low, const uint8_t* fifth, float* out) {
    const uint8_t* s = block + 4;
    for (int g = 0; g < 8; ++g, out += 32) {
        const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | s[g - 4] >> 6 << 4;
        const int minimum = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | s[g] >> 6 << 4;
        const float d = half(block) * float(scale), m = half(block + 2) * float(minimum);
        for (int i = 0; i < 32; ++i) {
            const int top = fifth ? (fifth[i] >> g & 1) << 4 : 0;
            out[i] = float((low[g / 2 * 32 + i] >> (g & 1 ? 4 : 0) & 15) | top) * d - m;
        }
    }
}

void q6_k(const uint8_t* block, float* out) {
    const float d = half(block + 208);
    for (int g = 0; g < 16; ++g, out += 16) {  // 16 numbers with one scale
        const int side = g / 8, part = g % 8 / 2, at = g % 2 * 16;
        const uint8_t *low = block + 64 * side + part % 2 * 32 + at, *high = block + 128 + 32 * side + at;
        const float scale = d * float(int8_t(block[192 + g]));
        for (int i = 0; i < 16; ++i)
            out[i] = float(((low[i] >> (part < 2 ? 0 : 4) & 15) | (high[i] >> 2 * part & 3) << 4) - 32) * scale;
    }
}

}  // namespace

void values(int format, const uint8_t* blocks, int64_t n, float* out) {
    const Layout l = layout(format);
    for (int64_t i = 0; i < n; ++i, blocks += l.block, out += l.columns) {
        switch (format) {
            case Q4_0: q4_0(blocks, out); break;
            case Q8_0: q8_0(blocks, out); break;
            case Q4_K: q45_k(blocks, blocks + 16, nullptr, out); break;
            case Q5_K: q45_k(blocks, blocks + 48, blocks + 16, out); break;
            case Q6_K: q6_k(blocks, out); break;
        }
    }
}

}  // namespace herd
