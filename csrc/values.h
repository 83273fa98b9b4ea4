#pragma once
#include <cstdint>

namespace herd {
// `n` GGML blocks of a format that is packed -> the numbers they stand for, block by block.
void values(int format, const uint8_t* blocks, int64_t n, float* out);
}
