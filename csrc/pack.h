#pragma once
#include <cstdint>

namespace herd {
// Panels [first, last) of `source`, GGML blocks of [rows, columns], to `out`. Rows beyond the last are zero.
void pack(int format, const uint8_t* source, int64_t rows, int64_t columns, int64_t first, int64_t last, uint8_t* out);
}
