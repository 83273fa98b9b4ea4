// From GGML blocks, row by row, to panels. Numbers do not change; they are only put where a vector load finds them.
#include <cstring>
#include "formats.h"
#include "pack.h"

namespace herd {
namespace {

// One row's numbers of a group, as bytes.
void numbers(int format, const uint8_t* block, int group, uint8_t* n) {
    switch (format) {
        case Q4_0:
            for (int i = 0; i < 16; ++i) { n[i] = block[2 + i] & 15; n[16 + i] = block[2 + i] >> 4; }
            return;
        case Q8_0:
            for (int i = 0; i < 32; ++i) n[i] = uint8_t(block[2 + i] ^ 0x80);
            return;
        case Q4_K:
        case Q5_K: {
            const uint8_t* q = block + (format == Q4_K ? 16 : 48) + group / 2 * 32;
            for (int i = 0; i < 32; ++i) {
                n[i] = group & 1 ? q[i] >> 4 : q[i] & 15;
                if (format == Q5_K) n[i] |= (block[16 + i] >> group & 1) << 4;
            }
            return;
        }
        case Q6_K: {
            const int half = group / 4, k = group % 4;
            for (int i = 0; i < 32; ++i) {
                const uint8_t low = block[64 * half + i + 32 * (k & 1)];
                n[i] = uint8_t((k < 2 ? low & 15 : low >> 4) | ((block[128 + 32 * half + i] >> 2 * k & 3) << 4));
            }
            return;
        }
    }
}

void k_scales(const uint8_t* s, int j, uint8_t* scale, uint8_t* minimum) {
    if (j < 4) {
        *scale = s[j] & 63;
        *minimum = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
        *minimum = (s[j + 4] >> 4) | (s[j] >> 6 << 4);
    }
}

}  // namespace

void pack(int format, const uint8_t* source, int64_t rows, int64_t columns, int64_t first, int64_t last, uint8_t* out) {
    const Layout l = layout(format);
    const int groups = l.columns / GROUP;
    const int64_t blocks = columns / l.columns, size = panel_bytes(format, columns);
    for (int64_t p = first; p < last; ++p) {
        uint8_t* panel = out + (p - first) * size;
        std::memset(panel, 0, size);
        for (int r = 0; r < PANEL; ++r) {
            const int64_t row = p * PANEL + r;
            if (row >= rows) break;
            uint8_t* to = panel;
            for (int64_t b = 0; b < blocks; ++b) {
                const uint8_t* block = source + (row * blocks + b) * l.block;
                if (format == Q4_K || format == Q5_K) {
                    std::memcpy(to + 2 * r, block, 2);
                    std::memcpy(to + 32 + 2 * r, block + 2, 2);
                } else if (format == Q6_K) {
                    std::memcpy(to + 2 * r, block + 208, 2);
                }
                to += l.head;
                for (int g = 0; g < groups; ++g, to += l.body) {
                    if (format == Q4_0 || format == Q8_0) {
                        std::memcpy(to + 2 * r, block, 2);
                    } else if (format == Q6_K) {
                        to[r] = block[192 + 2 * g];
                        to[16 + r] = block[192 + 2 * g + 1];
                    } else {
                        k_scales(block + 4, g, to + r, to + 16 + r);
                    }
                    uint8_t n[32];
                    numbers(format, block, g, n);
                    uint8_t* body = to + 32;
                    if (format == Q8_0) {
                        for (int c = 0; c < 8; ++c) std::memcpy(body + 64 * c + 4 * r, n + 4 * c, 4);
                        continue;
                    }
                    for (int c = 0; c < 4; ++c)
                        for (int i = 0; i < 4; ++i) body[64 * c + 4 * r + i] = uint8_t((n[4 * c + i] & 15) | (n[16 + 4 * c + i] & 15) << 4);
                    if (format == Q5_K)
                        for (int i = 0; i < 32; ++i) body[256 + 4 * r + i % 4] |= uint8_t((n[i] >> 4) << (i / 4));
                    if (format == Q6_K)
                        for (int i = 0; i < 32; ++i) body[256 + 64 * (i / 16) + 4 * r + i % 4] |= uint8_t((n[i] >> 4) << (2 * (i / 4 % 4)));
                }
            }
        }
    }
}

}  // namespace herd
